"""Telling rows of images from rows of text by their first one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

_IMAGE_COLUMNS = ("jpg_0", "jpg_1", "images", "image", "image_path", "path1")
_ANSWERS = ("chosen", "rejected")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def modality_of_rows(row: Mapping[str, Any]) -> str:
    """ "image" or "text"."""
    if any(row.get(name) is not None for name in _IMAGE_COLUMNS):
        return "image"
    return "image" if any(_is_image(row.get(name)) for name in _ANSWERS) else "text"


def _is_image(value: Any) -> bool:
    if isinstance(value, str):
        return PurePath(value).suffix.lower() in _SUFFIXES
    # Bytes, a picture of `datasets` or of PIL; messages are lists.
    return value is not None and not isinstance(value, (list, tuple))
