"""Rows of images as a contact sheet shows them."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL.Image import Image

from alignkit.data_report import Picture as Shown
from alignkit_diffusion.pictures import Picture
from alignkit_diffusion.rows import ImageRow

SIDE = 160


def thumbnail(picture: Picture, image: Image) -> bytes:
    """A small JPEG of an image."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def contacts(row: ImageRow, thumbnails: Sequence[bytes]) -> tuple[str, list[Shown]]:
    """The title of a row and its images: what the data says of each, where it stands, its size."""
    shown = [
        Shown(raw, "image/jpeg", f"{said}{one.column}, {one.width} x {one.height}")
        for one, said, raw in zip(row.pictures, _said(row), thumbnails, strict=True)
    ]
    return f"Row {row.number}: {row.prompt}", shown


def _said(row: ImageRow) -> list[str]:
    label = row.label
    if label.desirable is not None:
        return ["liked: " if label.desirable else "not liked: "]
    if label.tie or len(label.rank) == 1:
        return ["tie: " if label.tie else ""] * len(label.rank)
    if len(label.rank) == 2:
        return ["chosen: " if rank == 0 else "rejected: " for rank in label.rank]
    return [f"rank {rank}: " if rank >= 0 else "unranked: " for rank in label.rank]
