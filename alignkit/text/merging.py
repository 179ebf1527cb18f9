"""An adapter made part of its base: one model folder that needs no peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from alignkit.adapters import adapter_layers, quiet_peft
from alignkit.errors import ConfigError
from alignkit.text.loading import ADAPTER_CONFIG, adapter_folder, load_whole, tokenizer_beside


def merge(adapter: str, base: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of an adapter on its base, W + scale B A written into the weights.

    The sum is made in float32 and stored in the base's own dtype.

    Args:
        adapter: a folder or hub name of peft's files.
        base: the model to put it on; None is the one that its files name.

    Raises:
        ConfigError: for what is no adapter, has no base, or cannot be written into its weights.
    """
    folder = adapter_folder(adapter)
    if folder is None:
        raise ConfigError(
            f"Only an adapter is merged; {adapter!r} has no {ADAPTER_CONFIG} and is a whole model "
            "already. Load it as it is."
        )
    from peft import PeftConfig, PeftModel

    named = base or PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not named:
        raise ConfigError(
            f"The adapter {adapter!r} does not name its base, because it was trained on a model in "
            "hand. Give it with --base."
        )
    whole = load_whole(named, "auto")
    dtype = whole.dtype
    try:
        with quiet_peft():
            model = PeftModel.from_pretrained(whole.float(), str(folder))
            _refuse_tied(model)
            merged = model.merge_and_unload(safe_merge=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"The adapter {adapter!r} cannot be merged into {named}: {error}"
        ) from error
    return merged.to(dtype), tokenizer_beside(folder, named)


def _refuse_tied(model: Any) -> None:
    """One tensor that is embeddings and head at once takes no update that is meant for one."""
    base = model.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    adapted = [id(layer) for layer in adapter_layers(model)]
    weights = [
        getattr(getattr(end, "base_layer", end), "weight", None) for end in ends if end is not None
    ]
    tied = len(weights) == 2 and weights[0] is not None and weights[0] is weights[1]
    if tied and any(id(end) in adapted for end in ends):
        raise ConfigError(
            "This adapter changes the embeddings or the head, which are one tensor in this model: "
            "merged into it, the change would act on both. Keep the adapter beside its base."
        )


def save_merged(adapter: str, out: Path, base: str | None = None) -> None:
    """Write `merge` as a folder that `from_pretrained` loads."""
    model, tokenizer = merge(adapter, base)
    with torch.no_grad():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
