"""The image wing: preference training of Stable Diffusion pipelines.

`build` is its entry; what is named here is loaded on first use, so that the import costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignkit_diffusion.refiner import BaseAndRefiner as BaseAndRefiner
    from alignkit_diffusion.wing import build as build

_HOMES = {"build": "wing", "BaseAndRefiner": "refiner"}

__all__ = ["BaseAndRefiner", "build"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"alignkit_diffusion.{_HOMES[name]}"), name)
