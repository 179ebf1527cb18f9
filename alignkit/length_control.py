"""Win rates that a longer answer cannot buy: the length-controlled win rate.

Dubois et al. 2024 (2404.04475), the regression behind AlpacaEval 2. With d the length of the second
policy's answer minus that of the first one's, s the standard deviation of d over prompts:

    P(second preferred) = sigmoid(theta + phi tanh(d / s) + psi c)

Fitted by maximum likelihood; the length-controlled win rate is the mean over prompts at d = 0. c is
an optional covariate of the prompt. AlpacaEval's is the difficulty of the instruction, which it
knows from many models; two policies alone do not tell it, so c is there only when the caller has
one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from alignkit.errors import DataError
from alignkit.intervals import Floats, Prompts, Scores, numbers, percentiles, present
from alignkit.statistics import preference_rate

RIDGE = 0.01
"""Weight of the squared coefficients, halved, against a sum over prompts: it keeps the fit finite
where length alone, or nothing, decides all comparisons, and does not matter otherwise."""


@dataclass(frozen=True)
class LengthControlled:
    """A win rate at equal length.

    Attributes:
        value: the win rate that is expected where both answers are of one length.
        low, high: confidence interval over prompts.
        plain: the win rate as it is.
        slope: phi: how much the logit rises where the second answer is very much longer.
        slope_low, slope_high: its interval; around 0 length does not decide.
        num: comparisons; missing: those left out for want of a preference.
        confidence: coverage of the intervals.
    """

    value: float
    low: float
    high: float
    plain: float
    slope: float
    slope_low: float
    slope_high: float
    num: int
    missing: int = 0
    confidence: float = 0.95


def length_controlled_win_rate(
    found: Scores,
    length_before: Scores,
    length_after: Scores,
    *,
    covariate: Scores | None = None,
    prompts: Prompts = None,
    confidence: float = 0.95,
    num_resamples: int = 1_000,
    seed: int = 0,
) -> LengthControlled:
    """The win rate at equal length, with a paired bootstrap over prompts.

    Args:
        found: preferences for the second policy, in [0, 1]; see `statistics.preferences`.
        length_before, length_after: of the two answers, in any one unit.
        covariate: what else decides, centred on what is to be expected, such as the difference of a
            quality that has nothing to do with length.
        prompts: the prompt of each comparison, where some occur more than once.
        confidence, num_resamples, seed: of the bootstrap; every resample is a fit of its own.

    Raises:
        DataError: for lists of different lengths, without a preference, or where all answers differ
            by one and the same length, so that length and quality cannot be told apart.
    """
    values, first, second = numbers(found, length_before, length_after)
    kept, clusters, missing = present(values, prompts, "No prompt has a preference")
    there = ~np.isnan(values)
    difference = (second - first)[there]
    if np.isnan(difference).any():
        raise DataError("Every answer that is compared needs a length; some have none.")
    spread = float(difference.std())
    if spread == 0:
        if difference[0] != 0:
            raise DataError(
                "Length control compares prompts whose answers differ in length by more or less; "
                f"all of them differ by {difference[0]:g}. Give more prompts."
            )
        return _plain(found, prompts, confidence, seed)
    others = [] if covariate is None else [numbers(covariate)[0][there]]
    table = np.column_stack([np.ones_like(kept), np.tanh(difference / spread), *others])
    start = _fit(table, kept, np.ones_like(kept), np.zeros(table.shape[1]))
    fits, rates = [], []
    for times in clusters.draws(num_resamples, seed):
        for weight in times[:, clusters.owner]:
            fits.append(_fit(table, kept, weight, start))
            rates.append(_at_equal_length(table, fits[-1], weight))
    low, high = percentiles(np.array(rates), confidence)
    slope_low, slope_high = percentiles(np.array(fits)[:, 1], confidence)
    return LengthControlled(
        value=_at_equal_length(table, start, np.ones_like(kept)),
        low=low,
        high=high,
        plain=float(kept.mean()),
        slope=float(start[1]),
        slope_low=slope_low,
        slope_high=slope_high,
        num=len(kept),
        missing=missing,
        confidence=confidence,
    )


def _fit(table: Floats, target: Floats, weight: Floats, start: Floats) -> Floats:
    """Coefficients of the logistic regression with fractional targets."""

    def loss(at: Floats) -> tuple[float, Floats]:
        logit = table @ at
        value = weight @ (np.logaddexp(0, logit) - target * logit) + RIDGE / 2 * at @ at
        return float(value), table.T @ (weight * (expit(logit) - target)) + RIDGE * at

    def curvature(at: Floats) -> Floats:
        share = expit(table @ at)
        bend = weight * share * (1 - share)
        return (table.T * bend) @ table + RIDGE * np.eye(len(at))

    found = minimize(loss, start, jac=True, hess=curvature, method="trust-exact")
    return np.asarray(found.x, dtype=np.float64)


def _at_equal_length(table: Floats, fit: Floats, weight: Floats) -> float:
    logit = table @ fit - table[:, 1] * fit[1]
    return float(weight @ expit(logit) / weight.sum())


def _plain(found: Scores, prompts: Prompts, confidence: float, seed: int) -> LengthControlled:
    """Where all lengths are equal there is nothing to control for."""
    rate = preference_rate(found, prompts=prompts, confidence=confidence, seed=seed)
    return LengthControlled(
        value=rate.value,
        low=rate.low,
        high=rate.high,
        plain=rate.value,
        slope=0.0,
        slope_low=0.0,
        slope_high=0.0,
        num=rate.num,
        missing=rate.missing,
        confidence=confidence,
    )
