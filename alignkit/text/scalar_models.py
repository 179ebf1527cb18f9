"""Models that score answers: made of a causal language model's trunk, or loaded as they were saved.

They are those of `AutoModelForSequenceClassification` whose trunk is a decoder. A model's pad token
must not be one that ends answers: transformers finds an answer's last token as the last one that is
no padding.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignkit.adapters import quiet_peft
from alignkit.errors import ConfigError
from alignkit.text.handed import base_of
from alignkit.text.loading import (
    adapter_folder,
    load,
    loading_errors_of,
    tokenizer_beside,
    tokenizer_of,
)
from alignkit.text.scalar import HEAD

_SCORES = "ForSequenceClassification"
_NO_CODE: dict[str, Any] = {"trust_remote_code": False}


def load_scalar(
    source: Any,
    *,
    dtype: torch.dtype,
    masters: torch.dtype,
    quantization: str | None = None,
    device: torch.device | str = "cpu",
    outputs: int = 1,
    head: str = "normal",
    seed: int = 0,
) -> tuple[Any, Any]:
    """(model, tokenizer) that scores answers.

    A reward model's folder goes on from where it is, adapter and head included. A causal language
    model gives its trunk, with a LoRA on it merged; of one in hand a copy, since it is another
    model that is trained here.

    Args:
        source: folder, hub name, or (model, tokenizer).
        dtype, masters, quantization, device: as of `loading.load`.
        outputs: of the head.
        head: how a new one begins: "normal", with a spread of 1 / sqrt(width + 1) (Stiennon et al.
            2020, 2009.01325), or "zeros".
        seed: of its weights.

    Raises:
        ConfigError: if it is none of these, or its class has no such head.
    """
    if isinstance(source, (str, Path)) and is_scalar(source):
        with loading_errors_of(f"The reward model {str(source)!r} could not be loaded"):
            model, tokenizer = _as_saved(str(source), dtype, masters, outputs)
    else:
        model, tokenizer = load(
            source, dtype=dtype, masters=masters, quantization=quantization, device=device
        )
        if not _scores(model):
            in_hand = isinstance(source, (tuple, list))
            model = scalar_of(model, copied=in_hand, outputs=outputs, head=head, seed=seed)
    _check_outputs(model, outputs)
    set_padding(model, tokenizer)
    return model, tokenizer


def is_scalar(name: str | Path) -> bool:
    """Whether a folder or repository holds a model that scores answers, or an adapter of one."""
    from transformers import PretrainedConfig

    with loading_errors_of(f"The model {str(name)!r} could not be read"):
        folder = adapter_folder(str(name))
        if folder is not None:
            from peft import PeftConfig

            return str(PeftConfig.from_pretrained(str(folder)).task_type).endswith("SEQ_CLS")
        config, _ = PretrainedConfig.get_config_dict(str(name))
    return any(one.endswith(_SCORES) for one in config.get("architectures") or ())


def scalar_of(
    model: Any, *, copied: bool, outputs: int = 1, head: str = "normal", seed: int = 0
) -> Any:
    """A causal language model's trunk with a new head in float32.

    Args:
        model: a `PreTrainedModel`, or a `PeftModel`, whose adapter is merged.
        copied: whether the trunk is copied, or taken over from a model that nobody needs any more.
        outputs, head, seed: as of `load_scalar`.

    Raises:
        ConfigError: if transformers has no such class for this model.
    """
    from transformers import AutoModelForSequenceClassification

    held = copy.deepcopy(model) if copied else model
    if hasattr(held, "merge_and_unload"):
        if getattr(held, "is_quantized", False):
            raise ConfigError(
                "A reward model or critic from a policy with quantised weights and an adapter "
                "needs that merged, which rounds. Give the base, or a merged model in bf16."
            )
        held = held.merge_and_unload()
    config = copy.deepcopy(held.config)
    config.num_labels = outputs
    try:
        with torch.device("meta"):
            made = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise ConfigError(_no_head(held)) from error
    trunk = getattr(held, held.base_model_prefix, None)
    own = getattr(made, made.base_model_prefix, None)
    if type(trunk) is not type(own) or not isinstance(getattr(made, HEAD, None), nn.Linear):
        raise ConfigError(_no_head(held))
    setattr(made, made.base_model_prefix, trunk)
    setattr(made, HEAD, _new_head(getattr(made, HEAD), _device_of(held), head, seed))
    made.config.problem_type = None
    return made.train(held.training).requires_grad_(True)


def _new_head(like: nn.Linear, device: torch.device, start: str, seed: int) -> nn.Linear:
    made = nn.Linear(like.in_features, like.out_features, bias=like.bias is not None)
    spread = {"normal": 1 / math.sqrt(like.in_features + 1), "zeros": 0.0}[start]
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made.weight.copy_(spread * torch.randn(made.weight.shape, generator=draw))
        if made.bias is not None:
            made.bias.zero_()
    return made.to(device)


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _scores(model: Any) -> bool:
    return type(base_of(model)).__name__.endswith(_SCORES)


def _no_head(model: Any) -> str:
    name = type(model).__name__
    return (
        f"{name} cannot score answers: transformers has no class for sequence classification that "
        f"puts a head named {HEAD!r} on this trunk. Take a decoder that has one, such as Llama, "
        "Qwen, Mistral, Gemma or GPT-2."
    )


def _as_saved(name: str, dtype: torch.dtype, masters: torch.dtype, outputs: int) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification

    folder = adapter_folder(name)
    if folder is None:
        model, told = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=masters, use_safetensors=True, output_loading_info=True, **_NO_CODE
        )
        if told["missing_keys"]:
            raise ConfigError(
                f"The reward model {name!r} lacks the weights of {sorted(told['missing_keys'])}, "
                "which would start at random. Give a whole one."
            )
        return model, tokenizer_of(name)
    from peft import AutoPeftModelForSequenceClassification

    with quiet_peft():
        model = AutoPeftModelForSequenceClassification.from_pretrained(
            str(folder),
            is_trainable=True,
            dtype=dtype,
            num_labels=outputs,
            use_safetensors=True,
            **_NO_CODE,
        )
    base = model.peft_config[model.active_adapter].base_model_name_or_path
    return model, tokenizer_beside(folder, base)


def _check_outputs(model: Any, outputs: int) -> None:
    base = base_of(model)
    found = getattr(base, HEAD, None)
    if found is None:
        raise ConfigError(_no_head(base))
    if base.config.num_labels != outputs:
        raise ConfigError(
            f"This reward model's head needs {outputs} output(s) and has "
            f"{base.config.num_labels}. Begin from another model, or load it with "
            f"num_labels={outputs}."
        )


def set_padding(model: Any, tokenizer: Any) -> None:
    """A pad token in the model's config that ends no answer; None if the tokenizer has no other."""
    config = base_of(model).config.get_text_config()
    ends = getattr(config, "eos_token_id", None)
    ends = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    ends |= {tokenizer.eos_token_id, None}
    if config.pad_token_id not in ends:
        return
    names = ("pad_token_id", "unk_token_id", "bos_token_id")
    found = [getattr(tokenizer, name, None) for name in names]
    config.pad_token_id = next((i for i in found if i not in ends), None)
