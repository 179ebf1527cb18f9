"""Aspect buckets: shapes of about one area, so that little of a picture is cropped away.

The rule is that of SDXL's list (Podell et al. 2023, 2307.01952, appendix I): sides in steps of 64,
an area of at least nine tenths of resolution^2 and not above it, sides at most four times apart. At
1024 px it gives the published list and the one shape, 704 x 1344 turned, that the list has lying
only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

Shape = tuple[int, int]
"""Height and width in pixels."""

SMALLEST_AREA = 0.9
LARGEST_ASPECT = 4


@cache
def bucket_list(resolution: int, step: int) -> tuple[Shape, ...]:
    """The shapes around resolution^2 pixels whose sides are multiples of `step`, tallest last."""
    area = resolution * resolution
    sides = range(step, LARGEST_ASPECT * resolution + 1, step)
    return tuple(
        (height, width)
        for height in sides
        for width in sides
        if SMALLEST_AREA * area <= height * width <= area
        and max(height, width) <= LARGEST_ASPECT * min(height, width)
    )


def nearest_bucket(sizes: Sequence[Shape], buckets: Sequence[Shape]) -> Shape:
    """The bucket of a group of images: the one nearest to the mean of their log aspects.

    All images of a group share it, since a comparison needs one latent shape and one noise; the
    mean of logs favours no side, so that swapping chosen and rejected changes nothing.
    """
    wanted = sum(math.log(height / width) for height, width in sizes) / len(sizes)
    # Rounded: the same aspect in another size must not fall to another bucket by its last bit.
    return min(buckets, key=lambda shape: (round(abs(_log_aspect(*shape) - wanted), 9), shape))


@cache
def _log_aspect(height: int, width: int) -> float:
    return math.log(height / width)
