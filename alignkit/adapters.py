"""Where both wings meet peft: the configuration of a LoRA and the switch that turns it off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

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
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Inside, every adapter layer of `module` computes as its base layer.

    Restored on exit also after an exception. Gradient flags are kept as they were: peft's own
    switch freezes the adapter, and a frozen adapter that is still off while checkpointing
    recomputes would train nothing. Use it around a no-grad forward only.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    flags = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    was_off = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, off in zip(layers, was_off, strict=True):
            layer.enable_adapters(not off)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
