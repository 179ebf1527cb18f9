"""Loading causal language models and attaching adapters; what is the caller's stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from alignkit.adapters import lora_config
from alignkit.errors import ConfigError, nearest
from alignkit.options import LoRA
from alignkit.text.likelihood import repeated_layers


def load(policy: Any, *, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, tokenizer) from a folder, a hub name, or the pair itself.

    A folder with a PEFT adapter is loaded on its base, trainable. Weights come from safetensors
    only, and no code of the repository is run.

    Raises:
        ConfigError: if it is none of these, or has no tokenizer.
    """
    if isinstance(policy, (tuple, list)):
        return _in_memory(policy)
    if not isinstance(policy, (str, Path)):
        raise ConfigError(
            "A text policy is a folder, a hub name, or (model, tokenizer); got "
            f"{type(policy).__name__}. A model in hand comes with its tokenizer: (model, "
            "tokenizer)."
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = str(policy)
    # Weights only from safetensors: other formats are unpickled.
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    try:
        if (Path(name) / "adapter_config.json").exists():
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True, **options)
            # As peft saves them: further adapters in sub-folders of their names, here switched off.
            for file in sorted(Path(name).glob("*/adapter_config.json")):
                model.load_adapter(str(file.parent), adapter_name=file.parent.name)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, **options)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"The policy {name!r} could not be loaded as a causal language model with its "
            f"tokenizer: {error}"
        ) from error
    return model, tokenizer


def _in_memory(policy: Sequence[Any]) -> tuple[Any, Any]:
    if len(policy) != 2 or not isinstance(policy[0], nn.Module) or not callable(policy[1]):
        kinds = ", ".join(type(part).__name__ for part in policy)
        raise ConfigError(f"A text policy in memory is (model, tokenizer); got ({kinds}).")
    return policy[0], policy[1]


def attach(model: Any, adapter: LoRA | None) -> tuple[Any, str]:
    """The model with what is to be trained marked as such: (model, "none" | "fresh" | "continued").

    Trained parameters become float32, whatever the rest is stored in.
    """
    from peft import PeftModel, get_peft_model
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
        model = PeftModel.from_pretrained(model, adapter.continue_from, is_trainable=True)
        kind = "continued"
    else:
        from transformers.pytorch_utils import Conv1D

        targets = _targets(model, adapter)
        # GPT-2's Conv1D stores its weight transposed.
        transposed = any(isinstance(module, Conv1D) for module in model.modules())
        config = lora_config(adapter, targets, task_type="CAUSAL_LM", fan_in_fan_out=transposed)
        model = get_peft_model(model, config)
        kind = "fresh"
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return model, kind


def _train_active_adapter(model: Any) -> None:
    """Only the active adapter trains; peft may have loaded it for inference."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model.requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
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
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not getattr(base, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"{type(base).__name__} does not support gradient checkpointing; set "
            "trainer.gradient_checkpointing to false."
        )
    # transformers 5.23 renamed it.
    renamed = getattr(base, "activation_checkpointing_enable", None)
    (renamed or base.gradient_checkpointing_enable)({"use_reentrant": False})
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False) is True:
            drops = [
                n for n, v in vars(layer).items() if "drop" in n and v and isinstance(v, float)
            ]
            if drops and layer is not base:
                raise ConfigError(
                    f"{type(layer).__name__} applies dropout by its own {drops}, which would be on "
                    "while checkpointing. Set it to 0 in the model's config, or set "
                    "trainer.gradient_checkpointing to false."
                )
            layer.training = True
