"""The image wing: preference training of SDXL pipelines.

`build` is its one entry; it is loaded on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignkit_diffusion.wing import build as build

__all__ = ["build"]


def __getattr__(name: str) -> Any:
    if name != "build":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from alignkit_diffusion.wing import build

    return build
