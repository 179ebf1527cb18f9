"""Intervals: the bootstrap over prompts, and Wilson's for shares."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from alignkit.errors import DataError

Floats = NDArray[np.float64]
Scores = Sequence[float | None] | NDArray[np.floating]
"""One number per entry, higher is better; None or NaN where there is none."""
Prompts = Sequence[Hashable] | None
"""Whose value each entry is; None: every entry has a prompt of its own."""

_CELLS = 4_000_000
"""Largest number of resampled values in memory at once."""


def wilson(successes: float, num: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's (1927) score interval of a share, which stays inside [0, 1].

    Raises:
        DataError: unless 0 <= successes <= num and num > 0.
    """
    if not 0 <= successes <= num or num <= 0:
        raise DataError(
            f"wilson needs 0 <= successes <= num and num above 0; got {successes} of {num}."
        )
    z = NormalDist().inv_cdf(0.5 + _checked(confidence) / 2)
    share, spread = successes / num, z * z / num
    centre = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / num + spread / (4 * num))
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    # At the ends the formula is exact on paper and one rounding off in floating point.
    return (0.0 if successes == 0 else low), (1.0 if successes == num else high)


class Clusters:
    """Entries by prompt: what is resampled together.

    Args:
        size: number of entries.
        prompts: the prompt of each; None: each its own.
    """

    def __init__(self, size: int, prompts: Prompts = None) -> None:
        places: dict[Hashable, int] = {}
        owners = (
            range(size) if prompts is None else [places.setdefault(p, len(places)) for p in prompts]
        )
        self.owner = np.fromiter(owners, dtype=np.int64, count=size)
        self.num = size if prompts is None else len(places)

    def draws(self, num_resamples: int, seed: int) -> Iterator[Floats]:
        """Chunks of (resamples, prompts): how often each prompt was drawn, with replacement."""
        generator, even = np.random.default_rng(seed), np.full(self.num, 1 / self.num)
        chunk = max(1, _CELLS // self.num)
        for start in range(0, num_resamples, chunk):
            size = min(chunk, num_resamples - start)
            yield generator.multinomial(self.num, even, size=size).astype(np.float64)

    def means(self, values: Floats, num_resamples: int, seed: int) -> Floats:
        """(num_resamples,) means of `values` over prompts drawn with replacement."""
        sums = np.bincount(self.owner, weights=values, minlength=self.num)
        counts = np.bincount(self.owner, minlength=self.num)
        drawn = self.draws(num_resamples, seed)
        return np.concatenate([(times @ sums) / (times @ counts) for times in drawn])


def percentiles(resampled: Floats, confidence: float) -> tuple[float, float]:
    """The percentile interval of resampled values."""
    tail = (1 - _checked(confidence)) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def numbers(*columns: Scores) -> list[Floats]:
    """Columns of one length as floats, NaN where something is missing."""
    sizes = [len(column) for column in columns]
    if len(set(sizes)) > 1:
        raise DataError(
            "before and after need one score per prompt, of the same prompts; got "
            f"{' and '.join(map(str, sizes))} scores. Put None where an answer failed."
        )
    return [
        np.array([math.nan if value is None else value for value in column], dtype=np.float64)
        for column in columns
    ]


def present(values: Floats, prompts: Prompts, rule: str) -> tuple[Floats, Clusters, int]:
    """The values that are there, their clusters, and how many are not there."""
    if prompts is not None and len(prompts) != len(values):
        raise DataError(f"prompts has one entry per score; got {len(prompts)} for {len(values)}.")
    there = ~np.isnan(values)
    if not there.any():
        raise DataError(
            f"{rule}; got {len(values)} prompts, all of them missing one. Check the reward or "
            "judge that scored them."
        )
    kept = (
        None
        if prompts is None
        else [p for p, is_there in zip(prompts, there, strict=True) if is_there]
    )
    return values[there], Clusters(int(there.sum()), kept), int((~there).sum())


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise DataError(f"confidence must be between 0 and 1, such as 0.95; got {confidence}.")
    return confidence
