"""Scorers of images: frozen models that say how well an image pleases, or fits its prompt.

Each is a thin loader over a library's model and a reward, `(prompts, images, rows) -> scores`, so
that it labels data, evaluates, or rewards. Weights are safetensors, from a local path or a hub
name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from alignkit.errors import refuse_unknown
from alignkit_diffusion.scorers.aesthetic import load_aesthetic
from alignkit_diffusion.scorers.base import Scorer
from alignkit_diffusion.scorers.clip import load_clip, load_pickscore
from alignkit_diffusion.scorers.hps import load_hpsv2

SCORERS: Mapping[str, Callable[..., Scorer]] = MappingProxyType(
    {
        "pickscore": load_pickscore,
        "hpsv2": load_hpsv2,
        "clip": load_clip,
        "aesthetic": load_aesthetic,
    }
)
"""Name -> loader, `(weights, device=...) -> Scorer`. A new scorer is one line here."""


def load_scorer(
    name: str, weights: str | None = None, *, device: torch.device | str = "cpu"
) -> Scorer:
    """A scorer by name.

    Args:
        name: a key of `SCORERS`.
        weights: a local path or hub name in that scorer's format; None takes its hub name.
        device: where it computes.

    Raises:
        ConfigError: the name is not known, or the weights do not fit it.
    """
    refuse_unknown("scorer", name, SCORERS)
    loader = SCORERS[name]
    return loader(device=device) if weights is None else loader(weights, device=device)


__all__ = ["SCORERS", "Scorer", "load_scorer"]
