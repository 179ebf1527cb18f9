"""The pass over a data set: rows are read, images decoded in threads, and what is new encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from PIL.Image import Image
from torch import Tensor
from tqdm.auto import tqdm

from alignkit.columns import Sieve
from alignkit.errors import DataError
from alignkit.options import ImageOptions
from alignkit.rows import Rows
from alignkit.splits import in_part
from alignkit_diffusion.geometry import Geometry
from alignkit_diffusion.images import Placement
from alignkit_diffusion.latents import LatentStore
from alignkit_diffusion.pictures import Picture
from alignkit_diffusion.rows import HELD_OUT, ImageRow, Prepare, read_examples
from alignkit_diffusion.score_labels import ScoreTable
from alignkit_diffusion.streams import Streamed
from alignkit_diffusion.table import RowTable

Variants = list[tuple[Placement, Tensor]]
"""What of an image is to be encoded: placements and pixels."""


def scan(
    rows: Rows,
    kind: str,
    options: ImageOptions,
    sieve: Sieve,
    latents: LatentStore,
    *,
    indices: Iterable[int] | None = None,
    scores: ScoreTable | None = None,
) -> list[ImageRow]:
    """The usable rows; the variants of their images that are fixed are encoded.

    Args:
        rows, kind, options, sieve, indices, scores: as of `rows.read_examples`.
        latents: takes what is encoded.
    """
    geometry = Geometry(options)
    found = []
    reading = read_examples(
        rows, kind, options, sieve, variants(geometry, latents), indices=indices, scores=scores
    )
    total = None if indices is not None or isinstance(rows, Streamed) else len(rows)
    for row, made in tqdm(reading, f"Reading image {kind}", total, leave=False, disable=None):
        for picture, of_picture in zip(row.pictures, made, strict=True):
            for placement, pixels in of_picture:
                latents.queue(picture, placement, pixels)
        found.append(row)
    latents.flush()
    return found


def variants(geometry: Geometry, latents: LatentStore) -> Prepare:
    """Make pixels, while an image is decoded, of all its variants that are not encoded yet."""

    def of_row(pictures: list[Picture]) -> Callable[[Picture, Image], Variants]:
        placements = [geometry.placements(pictures, one) for one in geometry.fixed or ()]

        def of_picture(picture: Picture, image: Image) -> Variants:
            place = pictures.index(picture)
            wanted = [of_all[place] for of_all in placements]
            return [(one, one.pixels(image)) for one in wanted if latents.lacks(picture, one)]

        return of_picture

    return of_row


def missing(table: RowTable, options: ImageOptions, latents: LatentStore) -> list[int]:
    """Numbers in the data of the rows that have a fixed variant which is not encoded."""
    geometry = Geometry(options)
    found = []
    for row in range(len(table)):
        pictures = table.pictures(row)
        placements = [geometry.placements(pictures, one) for one in geometry.fixed or ()]
        if any(
            latents.lacks(picture, placement)
            for of_all in placements
            for picture, placement in zip(pictures, of_all, strict=True)
        ):
            found.append(table.number(row))
    return found


def part_of(table: RowTable, options: ImageOptions) -> tuple[RowTable, dict[str, int]]:
    """The rows of the part that the options ask for, and how many were left out of training."""
    if options.part == "all" or (options.held_out_share == 0 and options.part == "train"):
        return table, {}
    share, part = options.held_out_share, options.part
    wanted = np.array([in_part(prompt, share, part) for prompt in table.prompts], bool)
    mask = wanted[table.columns["prompt"]]
    left_out = int((~mask).sum())
    counted = {HELD_OUT: left_out} if part == "train" and left_out else {}
    return table.select(mask), counted


def refuse_empty(table: RowTable, name: str, skipped: dict[str, int]) -> None:
    """Raise `DataError` where no row is left."""
    if not len(table):
        raise DataError(
            f"Data must hold at least one usable row; {name} has none. Left out: {skipped}."
        )


def distinct_prompts(rows: Iterable[Any], options: ImageOptions, limit: int) -> list[str]:
    """The first `limit` distinct prompts of rows; rows without one are passed over."""
    found: dict[str, None] = {}
    for row in rows:
        if len(found) >= limit:
            break
        prompt = row.get("prompt", row.get("caption"))
        if isinstance(prompt, str) and in_part(prompt, options.held_out_share, options.part):
            found[prompt] = None
    return list(found)
