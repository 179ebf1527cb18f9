"""Finished models in other forms."""

from __future__ import annotations

import os
from pathlib import Path

from alignkit.atomic import atomic_folder
from alignkit.errors import ConfigError
from alignkit.trained import source_of


def export_merged(run_or_model: str | Path, out: str | Path, *, base: str | None = None) -> Path:
    """A language model's adapter and its base as one model folder, which needs no peft.

    Args:
        run_or_model: a run folder, or an adapter's folder or hub name.
        out: a folder that is not there yet.
        base: the model under the adapter, where its files do not name it.

    Returns:
        `out`, whole or not there.

    Raises:
        ConfigError: for what is no language model's adapter, or an `out` that is taken.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise ConfigError(f"The merged model needs a folder of its own; {out} is there already.")
    source = source_of(run_or_model)
    if source.modality != "text":
        raise ConfigError(
            f"Only a language model's adapter is merged; {str(run_or_model)!r} is of modality "
            f"{source.modality!r}. Load its LoRA into the pipeline (load_lora_weights, fuse_lora)."
        )
    from alignkit.text.merging import save_merged

    with atomic_folder(out) as temporary:
        save_merged(str(source.policy), temporary, base)
    return out
