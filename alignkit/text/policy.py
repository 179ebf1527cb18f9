"""Attaching adapters to causal language models and marking what is trained."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from alignkit.adapters import (
    adapter_layers,
    lora_config,
    quiet_peft,
    refuse_contradiction,
    refuse_zero_rows,
)
from alignkit.errors import ConfigError, nearest
from alignkit.options import LoRA
from alignkit.text.attention import as_computed, configs_of
from alignkit.text.handed import base_of
from alignkit.text.loading import adapter_folder
from alignkit.text.module import repeated_layers


def attach(model: Any, adapter: LoRA | None) -> tuple[Any, str]:
    """The model with what is to be trained marked as such: (model, "none" | "fresh" | "continued").

    Trained parameters become float32, whatever the rest is stored in.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model, PeftModel):
        if adapter is not None:
            raise ConfigError(
                "The policy already carries a PEFT adapter, and `adapter` asks for another. Leave "
                "`adapter` out to go on with the one it has, or merge it first (merge_and_unload)."
            )
        kind = "continued"
        _train_active_adapter(model)
    elif any(isinstance(layer, BaseTunerLayer) for layer in model.modules()):
        raise ConfigError(
            "This model carries an adapter's layers and is not the PeftModel that made them (has "
            "it been trained with an adapter before?). Give that PeftModel, such as result.model, "
            "or load the model afresh."
        )
    elif adapter is None:
        model.requires_grad_(True)
        kind = "none"
    elif adapter.continue_from is not None:
        model = _continued(model, adapter)
        kind = "continued"
    else:
        model = _fresh(model, adapter)
        kind = "fresh"
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return model, kind


def _fresh(model: Any, adapter: LoRA) -> Any:
    from peft import get_peft_model
    from transformers.pytorch_utils import Conv1D

    targets = _targets(model, adapter)
    # GPT-2's Conv1D stores its weight transposed.
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    scores = type(model).__name__.endswith("ForSequenceClassification")
    task = "SEQ_CLS" if scores else "CAUSAL_LM"  # trains and saves the head that scores, too
    config = lora_config(adapter, targets, task_type=task, fan_in_fan_out=transposed)
    try:
        with quiet_peft():
            adapted = get_peft_model(model, config)
    except ValueError as error:  # layers that peft cannot adapt, such as Mamba's projections
        detach(model)
        raise ConfigError(
            f"peft cannot adapt these layers of {type(model).__name__}: {error} Name others with "
            "adapter.targets."
        ) from error
    try:
        refuse_zero_rows(adapted)
    except ConfigError:
        detach(model)
        raise
    return adapted


def _continued(model: Any, adapter: LoRA) -> Any:
    from peft import PeftConfig, PeftModel

    folder = adapter_folder(str(adapter.continue_from))
    if folder is None:
        raise ConfigError(
            "adapter.continue_from must be the folder or hub name of a PEFT adapter, with "
            f"adapter_config.json; got {str(adapter.continue_from)!r}."
        )
    refuse_contradiction(PeftConfig.from_pretrained(str(folder)), adapter)
    try:
        with quiet_peft():
            return PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        detach(model)
        raise ConfigError(
            f"The adapter {str(adapter.continue_from)!r} does not fit {type(model).__name__}: "
            f"{error}"
        ) from error


def detach(model: Any) -> Any:
    """The model without the adapter that `attach` gave it, as far as that got."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.unload() if hasattr(model, "unload") else model
    for name, layer in list(base.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            owner, _, last = name.rpartition(".")
            setattr(base.get_submodule(owner), last, layer.get_base_layer())
    vars(base).pop("peft_config", None)
    return base


def _train_active_adapter(model: Any) -> None:
    """Only the active adapter trains; peft may have loaded it for inference."""
    model.requires_grad_(False)
    for layer in adapter_layers(model):
        layer.set_adapter(layer.active_adapters)


def _targets(model: Any, adapter: LoRA) -> list[str] | str:
    """Names of the linear layers to adapt."""
    names = _linear_names(model)
    if not isinstance(adapter.targets, str):
        for target in adapter.targets:
            if not any(name == target or name.endswith("." + target) for name in names):
                short = {name.rsplit(".", 1)[-1] for name in names}
                raise ConfigError(
                    f"adapter.targets: no linear layer is named {target!r}."
                    f"{nearest(target, short)} Layers: {', '.join(sorted(short))}."
                )
        return list(adapter.targets)
    if adapter.targets in ("auto", "all", "attention+ff"):
        return names
    if adapter.targets == "attention":
        # Blocks call it self_attn, attn, attention or self_attention.
        chosen = [name for name in names if "attn" in name or "attention" in name]
        if chosen:
            return chosen
    raise ConfigError(
        f"adapter.targets={adapter.targets!r} is not known for this model; use 'auto', "
        "'attention', "
        "'attention+ff', 'all', or a list of module names."
    )


def _linear_names(model: Any) -> list[str]:
    """All linear layers of the transformer blocks; the head and embeddings stay as they are."""
    from transformers.pytorch_utils import Conv1D

    blocks = {id(m) for layer in repeated_layers(model) for m in layer.modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module) in blocks
    ]


def checkpoint_layers(model: Any) -> None:
    """Recompute the activations of each block in backward.

    transformers checkpoints a layer only while its `training` flag is set, and the model is in
    eval mode so that dropout is off: so the flag is set on the layers themselves and not on what
    they contain.

    Raises:
        ConfigError: where that is not possible.
    """
    obstacle = checkpointing_obstacle(model)
    if obstacle is not None:
        raise ConfigError(f"{obstacle} Set trainer.gradient_checkpointing to false.")
    base = base_of(model)
    # transformers 5.23 renamed it.
    renamed = getattr(base, "activation_checkpointing_enable", None)
    hooked = bool(getattr(base, "_require_grads_hooks", None))
    configs = configs_of(model)
    (renamed or base.gradient_checkpointing_enable)(
        {"use_reentrant": False, "context_fn": partial(as_computed, configs)}
    )
    if not hooked:  # only reentrant checkpointing needs inputs with a gradient
        base.disable_input_require_grads()
        vars(base).pop("_require_grads_hooks", None)
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False) is True:
            layer.training = True


def checkpointing_obstacle(model: Any) -> str | None:
    """Why the blocks of this model cannot be checkpointed, or None if they can."""
    base = base_of(model)
    if not getattr(base, "supports_gradient_checkpointing", False):
        return f"{type(base).__name__} does not support gradient checkpointing."
    for layer in model.modules():
        own = vars(layer).items() if hasattr(layer, "gradient_checkpointing") else ()
        drops = [name for name, value in own if "drop" in name and value]
        drops = [name for name in drops if isinstance(vars(layer)[name], float)]
        if drops and layer is not base:
            return (
                f"{type(layer).__name__} applies dropout by its own {drops}, which would be on "
                "while checkpointing."
            )
    return None
