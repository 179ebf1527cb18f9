"""Finished models in other forms."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

from alignkit.atomic import atomic_folder
from alignkit.errors import ConfigError
from alignkit.options import LoRA
from alignkit.parts import MODALITIES
from alignkit.trained import Source, source_of

IMAGE_ADAPTER = "pytorch_lora_weights.safetensors"


def export_merged(run_or_model: str | Path, out: str | Path, *, base: str | None = None) -> Path:
    """An adapter and its base as one model or pipeline folder, which needs no peft.

    Args:
        run_or_model: a run folder, or an adapter's folder; of language models a hub name, too.
        out: a folder that is not there yet.
        base: the model under the adapter, where neither its files nor its run name it.

    Returns:
        `out`, whole or not there.

    Raises:
        ConfigError: for what is no adapter, a base that nothing names, or an `out` that is taken.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise ConfigError(f"The merged model needs a folder of its own; {out} is there already.")
    if (Path(run_or_model) / IMAGE_ADAPTER).is_file():
        source = Source(str(run_or_model), base, LoRA(continue_from=str(run_or_model)))
        modality = "image"
    else:
        source = source_of(run_or_model)
        modality = source.modality
    adapter = str(source.policy)
    if modality == "image":
        adapter, base = _of_pipeline(source, base)
    merging = import_module(f"{MODALITIES[modality]}.merging")
    with atomic_folder(out) as temporary:
        merging.save_merged(adapter, temporary, base)
    return out


def _of_pipeline(source: Source, base: str | None) -> tuple[str, str]:
    """The adapter's folder, and its base."""
    if source.adapter is None or source.adapter.continue_from is None:
        raise ConfigError(
            f"Only an adapter is merged; {source.name!r} is a whole pipeline. Copy its folder."
        )
    found = source.policy if base is None else base
    if not isinstance(found, str) or found.startswith("<"):
        raise ConfigError(
            f"The files of the image adapter {source.name!r} do not name the pipeline under it. "
            "Give it: base='owner/name' (--base)."
        )
    return str(source.adapter.continue_from), found
