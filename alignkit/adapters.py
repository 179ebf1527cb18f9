"""Where both wings meet peft: the configuration of a LoRA, and switches between adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from alignkit.errors import ConfigError, refuse_unknown
from alignkit.options import LoRA


def lora_config(adapter: LoRA, targets: Sequence[str] | str, **extra: Any) -> Any:
    """The `peft.LoraConfig` of `adapter` on the given module names (or peft's "all-linear")."""
    from peft import LoraConfig

    alpha = adapter.rank if adapter.alpha is None else adapter.alpha
    return LoraConfig(
        r=adapter.rank,
        # peft types alpha as an int; a float is what the formula needs and what it computes with.
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_dora=adapter.kind == "dora",
        use_rslora=adapter.kind == "rslora",
        **extra,
    )


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without a warning of peft 0.21, which reads a property that transformers 5.23 renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def adapter_layers(module: nn.Module) -> list[Any]:
    """The layers of `module` in which peft keeps adapters, modules saved whole among them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [layer for layer in module.modules() if isinstance(layer, kinds)]


def adapter_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The tensors of `model` without adapters, and those of each adapter by its name.

    Named as in a model that never had one, so that names tell nothing of peft's wrappers; an
    adapter's without its own name.
    """
    of_adapters: set[int] = set()
    for layer in adapter_layers(model):
        kept = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.original_module
        own = {id(tensor) for tensor in (*layer.parameters(), *layer.buffers())}
        of_adapters |= own - {id(tensor) for tensor in (*kept.parameters(), *kept.buffers())}
    names = list(getattr(model, "peft_config", None) or {})
    base: dict[str, Tensor] = {}
    adapters: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for name, tensor in saved_tensors(model).items():
        bare = name.removeprefix("base_model.model.")
        bare = bare.replace(".base_layer.", ".").replace(".original_module.", ".")
        if id(tensor) not in of_adapters:
            base[bare] = tensor
            continue
        whose = next(one for one in names if f".{one}." in f"{bare}.")
        adapters[whose][f"{bare}.".replace(f".{whose}.", ".", 1)] = tensor
    return base, adapters


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, tied ones once; of 4-bit weights their scales, too."""
    found: dict[str, Tensor] = dict(module.named_parameters())
    for name, parameter in module.named_parameters():
        quantised = getattr(parameter, "quant_state", None)
        if quantised is not None:
            parts = quantised.as_dict(packed=True)
            found |= {f"{name}.{part}": value for part, value in parts.items()}
    for prefix, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def refuse_contradiction(config: Any, adapter: LoRA) -> None:
    """Raise `ConfigError` where options ask for another adapter than the one that is continued.

    Args:
        config: peft's, of the adapter that was loaded.
        adapter: options left at their defaults ask for nothing; the others must be what is there.
    """
    dora, rslora = getattr(config, "use_dora", False), getattr(config, "use_rslora", False)
    here = {
        "rank": getattr(config, "r", None),
        "alpha": getattr(config, "lora_alpha", None),
        "kind": "dora" if dora else "rslora" if rslora else "lora",
    }
    for name, value in here.items():
        asked = getattr(adapter, name)
        if asked not in (getattr(LoRA, name), value):
            raise ConfigError(
                f"An adapter that is continued keeps its {name}; {adapter.continue_from} has "
                f"{value!r}, adapter.{name} says {asked!r}. Leave adapter.{name} out."
            )
    if adapter.targets != "auto":
        raise ConfigError(
            f"An adapter that is continued keeps its layers; adapter.targets says "
            f"{adapter.targets!r}. Leave adapter.targets out."
        )


def refuse_zero_rows(module: nn.Module) -> None:
    """Raise `ConfigError` where a fresh DoRA adapter would compute 0/0.

    DoRA (2402.09353, Eq. 5) divides each row of a weight by its norm; pruned models have rows of 0.
    """
    parts = ".lora_magnitude_vector."
    layers = {
        name.split(parts)[0].removeprefix("base_model.model.")
        for name, tensor in module.named_parameters()
        if parts in f"{name}." and not bool(tensor.detach().all())
    }
    if layers:
        named = sorted(layers)
        more = f" and {len(named) - 4} more" if len(named) > 4 else ""
        raise ConfigError(
            "DoRA divides each row of an adapted weight by the row's norm, and these layers have "
            f"rows that are all 0: {', '.join(named[:4])}{more}. Use adapter.kind='lora', or leave "
            "these layers out by naming others in adapter.targets."
        )


def active_adapters(module: nn.Module) -> list[str]:
    """The names of the adapters that `module` computes with."""
    layers = adapter_layers(module)
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))


def adapters_off(module: nn.Module) -> AbstractContextManager[None]:
    """Inside, every adapter layer of `module` computes as its base layer.

    Use it around a no-grad forward only; see `_switched`.
    """
    return _switched(module, lambda layer: layer.enable_adapters(False))


def adapter_on(module: nn.Module, name: str) -> AbstractContextManager[None]:
    """Inside, `module` computes with the adapter `name` in place of the active one.

    Use it around a no-grad forward only; see `_switched`.

    Raises:
        ConfigError: there is no such adapter.
    """
    refuse_unknown("adapter of the policy", name, getattr(module, "peft_config", None) or {})

    def switch(layer: Any) -> None:
        # A layer that this adapter does not touch computes as its base.
        has_it = name in layer._get_available_adapters()
        layer.enable_adapters(has_it)
        if has_it:
            layer.set_adapter([name])

    return _switched(module, switch)


@contextmanager
def _switched(module: nn.Module, switch: Callable[[Any], None]) -> Iterator[None]:
    """`switch` on every adapter layer, undone on exit, also after an exception.

    Gradient flags are kept as they were: peft's own switches freeze adapters, and a frozen adapter
    that is still off while checkpointing recomputes would train nothing.
    """
    layers = adapter_layers(module)
    flags = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    before = [(list(layer.active_adapters), layer.disable_adapters) for layer in layers]
    try:
        for layer in layers:
            switch(layer)
        yield
    finally:
        for layer, (active, off) in zip(layers, before, strict=True):
            layer.set_adapter(active)
            layer.enable_adapters(not off)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
