"""Means, shares and win rates with intervals: what every evaluation says of a sample.

The unit of resampling is the prompt: both policies answered the same prompts, so a comparison is
paired, and what an interval covers is the choice of prompts. Several values of one prompt move
together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from alignkit.intervals import (
    Floats,
    Prompts,
    Scores,
    numbers,
    percentiles,
    present,
    wilson,
)

__all__ = [
    "Difference",
    "Mean",
    "WinRate",
    "mean",
    "paired_difference",
    "preference_rate",
    "preferences",
    "wilson",
    "win_rate",
]


@dataclass(frozen=True)
class WinRate:
    """How often the second policy's answer beats the first one's, on the same prompts.

    Attributes:
        value: mean preference: 1 for a win, 1/2 for a tie, 0 for a loss, or what a judge gave.
        low, high: confidence interval of `value` over prompts.
        num: comparisons.
        wins, ties, losses: preferences above, at and below one half.
        missing: comparisons left out because a score is missing.
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
class Mean:
    """A mean with its interval over prompts.

    Attributes:
        value: the mean.
        low, high: confidence interval of `value` over prompts.
        num: entries; missing: entries without a value.
        confidence: coverage of the interval.
    """

    value: float
    low: float
    high: float
    num: int
    missing: int = 0
    confidence: float = 0.95


@dataclass(frozen=True)
class Difference(Mean):
    """Mean of after - before on the same prompts.

    Attributes:
        before, after: the two means, over the entries compared.
    """

    before: float = math.nan
    after: float = math.nan

    def __str__(self) -> str:
        missing = f", {self.missing} missing" if self.missing else ""
        return f"{self.value:+.4g} [{self.low:+.4g}, {self.high:+.4g}], n={self.num}{missing}"


def preferences(before: Scores, after: Scores) -> Floats:
    """1 where `after` scores higher, 1/2 at a tie, 0 where lower, NaN where a score is missing.

    Raises:
        DataError: for lists of different lengths.
    """
    first, second = numbers(before, after)
    missing = np.isnan(first) | np.isnan(second)
    return np.where(missing, np.nan, (second > first) + 0.5 * (second == first))


def win_rate(
    before: Scores,
    after: Scores,
    *,
    prompts: Prompts = None,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> WinRate:
    """The share of prompts on which `after` scores higher than `before`; a tie counts one half.

    Args:
        before: one score per prompt, higher is better; None where there is none.
        after: scores of the same prompts in the same order.
        prompts, confidence, num_resamples, seed: see `preference_rate`.

    Raises:
        DataError: for lists of different lengths, or without a prompt that has both scores.
    """
    return preference_rate(
        preferences(before, after),
        prompts=prompts,
        confidence=confidence,
        num_resamples=num_resamples,
        seed=seed,
    )


def preference_rate(
    found: Scores,
    *,
    prompts: Prompts = None,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> WinRate:
    """The mean of preferences in [0, 1], such as a judge's probabilities, as a win rate.

    The interval is the percentile bootstrap over prompts. Where every comparison gave a win, or
    every one a loss, resampling knows no spread, and the interval is Wilson's.

    Args:
        found: of each comparison; None where there is none.
        prompts: the prompt of each comparison, where some occur more than once.
        confidence: coverage of the interval.
        num_resamples: bootstrap resamples.
        seed: of the resampling; equal seeds give equal intervals.

    Raises:
        DataError: if no comparison has a preference.
    """
    (values,) = numbers(found)
    kept, clusters, missing = present(
        values, prompts, "No prompt has a score both before and after"
    )
    num, wins, losses = len(kept), int((kept > 0.5).sum()), int((kept < 0.5).sum())
    value = float(kept.mean())
    if value in (0.0, 1.0):
        low, high = wilson(round(value * clusters.num), clusters.num, confidence)
    else:
        means = clusters.means(kept, num_resamples, seed)
        low, high = percentiles(means, confidence)
    ties = num - wins - losses
    return WinRate(value, low, high, num, wins, ties, losses, missing, confidence)


def mean(
    values: Scores,
    *,
    prompts: Prompts = None,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Mean:
    """The mean of `values` with a percentile bootstrap interval over prompts.

    Raises:
        DataError: if there is no value.
    """
    (given,) = numbers(values)
    kept, clusters, missing = present(given, prompts, "No prompt has a value")
    low, high = percentiles(clusters.means(kept, num_resamples, seed), confidence)
    return Mean(float(kept.mean()), low, high, len(kept), missing, confidence)


def paired_difference(
    before: Scores,
    after: Scores,
    *,
    prompts: Prompts = None,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Mean of `after - before` over prompts, with a percentile bootstrap interval.

    Args:
        before: one score per prompt; None where there is none.
        after: scores of the same prompts in the same order.
        prompts, confidence, num_resamples, seed: see `preference_rate`.

    Raises:
        DataError: for lists of different lengths, or without a prompt that has both scores.
    """
    first, second = numbers(before, after)
    change = second - first
    kept, clusters, missing = present(
        change, prompts, "No prompt has a score both before and after"
    )
    low, high = percentiles(clusters.means(kept, num_resamples, seed), confidence)
    both = ~np.isnan(change)
    return Difference(
        value=float(kept.mean()),
        low=low,
        high=high,
        num=len(kept),
        missing=missing,
        confidence=confidence,
        before=float(first[both].mean()),
        after=float(second[both].mean()),
    )
