"""The VAE and the text encoders of a pipeline: loaded, or on disk until they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from alignkit_diffusion.cache.keys import hash_of_files, hash_of_module, settings
from alignkit_diffusion.unloaded import LAZY, Unloaded, weight_files


@dataclass
class Parts:
    """The VAE and the text encoders of a pipeline: loaded, or on disk until they are needed.

    Attributes:
        pipe: the pipeline.
        vae: its VAE in the best precision there is.
        folder: where the weights are; None for a pipeline in memory.
        shells: parts of the pipeline that may still be on disk, by name.
        exact: what fills `vae`.
        settings: of VAE and text encoders by name, as they were before anything was loaded, which
            adds to them.
    """

    pipe: Any
    vae: Any
    folder: Path | None = None
    shells: Mapping[str, Unloaded] = field(default_factory=dict)
    exact: Unloaded | None = None
    settings: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        found = {name: getattr(self.pipe, name, None) for name in LAZY}
        self.settings = {
            name: settings(
                part.config.to_dict() if hasattr(part.config, "to_dict") else part.config
            )
            for name, part in found.items()
            if part is not None
        }

    def fill_vae(self) -> None:
        """Load what encodes and decodes."""
        if self.exact is not None:
            self.exact.fill()

    def fill_encoders(self) -> None:
        """Load the text encoders."""
        for name, shell in self.shells.items():
            if name.startswith("text_encoder"):
                shell.fill()

    def fill(self) -> None:
        """Load everything that the pipeline has."""
        for shell in self.shells.values():
            shell.fill()

    def dtype_of(self, name: str) -> torch.dtype:
        """That a part of the pipeline computes in."""
        if name in self.shells:
            return self.shells[name].dtype
        dtype: torch.dtype = next(getattr(self.pipe, name).parameters()).dtype
        return dtype

    def hash_of(self, name: str, memo: Path | None = None) -> str:
        """Of a part's weights, read from its files where it has some; see `hash_of_files`."""
        if self.folder is not None and name in self.shells:
            return hash_of_files(weight_files(self.folder, name), memo)
        return hash_of_module(self.vae if name == "vae" else getattr(self.pipe, name))
