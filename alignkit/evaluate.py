"""Did it get better? Win rates and differences before against after, with intervals.

The unit of resampling is the prompt: both policies answered the same prompts, so the comparison is
paired, and what the interval covers is the choice of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from alignkit.errors import DataError

Scores = Sequence[float | None] | NDArray[np.floating]
"""One score per prompt, higher is better; None or NaN where there is none."""

_CELLS = 4_000_000
"""Largest number of resampled values in memory at once."""


@dataclass(frozen=True)
class WinRate:
    """How often the second policy's answer beats the first one's, on the same prompts.

    Attributes:
        value: (wins + ties / 2) / num.
        low, high: confidence interval of `value` over prompts.
        num: prompts compared.
        missing: prompts left out because a score is missing.
        confidence: coverage of the interval.
    """

    value: float
    low: float
    high: float
    num: int
    wins: int
    ties: int
    losses: int
    missing: int = 0
    confidence: float = 0.95

    def __str__(self) -> str:
        value, low, high = (f"{100 * share:.1f}" for share in (self.value, self.low, self.high))
        missing = f", {self.missing} missing" if self.missing else ""
        return f"{value} % [{low}, {high}], n={self.num}{missing}"


@dataclass(frozen=True)
class Difference:
    """Mean of after - before on the same prompts.

    Attributes:
        value: the mean difference, in the unit of the scores.
        low, high: confidence interval of `value` over prompts.
        before, after: the two means, over the prompts compared.
        num: prompts compared.
        missing: prompts left out because a score is missing.
        confidence: coverage of the interval.
    """

    value: float
    low: float
    high: float
    before: float
    after: float
    num: int
    missing: int = 0
    confidence: float = 0.95

    def __str__(self) -> str:
        missing = f", {self.missing} missing" if self.missing else ""
        return f"{self.value:+.4g} [{self.low:+.4g}, {self.high:+.4g}], n={self.num}{missing}"


def win_rate(
    before: Scores,
    after: Scores,
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> WinRate:
    """The share of prompts on which `after` scores higher than `before`; a tie counts one half.

    The interval is the percentile bootstrap over prompts. Where every prompt gave a win, or every
    one a loss, resampling knows no spread, and the interval is Wilson's.

    Args:
        before: one score per prompt, higher is better; None where there is none.
        after: scores of the same prompts in the same order.
        confidence: coverage of the interval.
        num_resamples: bootstrap resamples.
        seed: of the resampling; equal seeds give equal intervals.

    Raises:
        DataError: for lists of different lengths, or without a prompt that has both scores.
    """
    first, second, missing = _paired(before, after)
    num = len(first)
    wins, losses = int((second > first).sum()), int((second < first).sum())
    ties = num - wins - losses
    if num in (wins, losses):
        low, high = wilson(wins, num, confidence)
    else:
        # Resampling prompts with replacement and counting outcomes is one multinomial draw.
        shares = np.array([wins, ties, losses]) / num
        counts = np.random.default_rng(seed).multinomial(num, shares, size=num_resamples)
        low, high = _percentiles((counts[:, 0] + counts[:, 1] / 2) / num, confidence)
    return WinRate(
        value=(wins + ties / 2) / num,
        low=low,
        high=high,
        num=num,
        wins=wins,
        ties=ties,
        losses=losses,
        missing=missing,
        confidence=confidence,
    )


def paired_difference(
    before: Scores,
    after: Scores,
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Mean of `after - before` over prompts, with a percentile bootstrap interval.

    Args:
        before: one score per prompt; None where there is none.
        after: scores of the same prompts in the same order.
        confidence: coverage of the interval.
        num_resamples: bootstrap resamples.
        seed: of the resampling; equal seeds give equal intervals.

    Raises:
        DataError: for lists of different lengths, or without a prompt that has both scores.
    """
    first, second, missing = _paired(before, after)
    change, num = second - first, len(first)
    generator = np.random.default_rng(seed)
    chunk = max(1, _CELLS // num)
    means = [
        change[generator.integers(num, size=(min(chunk, num_resamples - start), num))].mean(axis=1)
        for start in range(0, num_resamples, chunk)
    ]
    low, high = _percentiles(np.concatenate(means), confidence)
    return Difference(
        value=float(change.mean()),
        low=low,
        high=high,
        before=float(first.mean()),
        after=float(second.mean()),
        num=num,
        missing=missing,
        confidence=confidence,
    )


def wilson(successes: float, num: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's (1927) score interval of a share, which stays inside [0, 1].

    Raises:
        DataError: unless 0 <= successes <= num and num > 0.
    """
    if not 0 <= successes <= num or num <= 0:
        raise DataError(
            f"wilson needs 0 <= successes <= num and num above 0; got {successes} of {num}."
        )
    z = NormalDist().inv_cdf(0.5 + _confidence(confidence) / 2)
    share, spread = successes / num, z * z / num
    centre = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / num + spread / (4 * num))
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    # At the ends the formula is exact on paper and one rounding off in floating point.
    return (0.0 if successes == 0 else low), (1.0 if successes == num else high)


def _paired(before: Scores, after: Scores) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    if len(before) != len(after):
        raise DataError(
            "before and after need one score per prompt, of the same prompts; got "
            f"{len(before)} and {len(after)} scores. Put None where an answer failed."
        )
    first, second = (
        np.array([math.nan if score is None else score for score in scores], dtype=np.float64)
        for scores in (before, after)
    )
    both = ~(np.isnan(first) | np.isnan(second))
    if not both.any():
        raise DataError(
            f"No prompt has a score both before and after; got {len(first)} prompts, all of them "
            "missing one. Check the reward or judge that scored them."
        )
    return first[both], second[both], int((~both).sum())


def _percentiles(resampled: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    tail = (1 - _confidence(confidence)) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def _confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise DataError(f"confidence must be between 0 and 1, such as 0.95; got {confidence}.")
    return confidence
