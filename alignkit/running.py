"""Mean and spread of everything seen so far, for scores that are to have a scale of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from alignkit.losses.masked import moments
from alignkit.protocols import Collective
from alignkit.ranges import positive


class RunningMoments:
    """Count, mean and population variance of a stream of numbers, float64.

    Welford 1962, a batch at a time (Chan, Golub and LeVeque 1983): with the batch's n', m' and M',

        d = m' - m;   m += d n' / (n + n');   M += M' + d^2 n n' / (n + n')

    The numbers may come in any batches and on any number of processes; the result is that of all of
    them at once.
    """

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0.0, 0.0, 0.0

    def update(self, values: Float[Tensor, " n"], collective: Collective | None = None) -> None:
        """Take in the numbers of all processes; NaN, a missing score, is left out.

        Args:
            values: this process's numbers.
            collective: the other processes, all of which must call this; None is this one alone.
        """
        batch = moments(values, ~values.isnan(), collective)
        n, mean, variance = (float(x) for x in (batch.count, batch.mean, batch.variance))
        if n == 0:
            return
        total, apart = self.count + n, mean - self.mean
        self._squares += variance * n + apart**2 * self.count * n / total
        self.mean += apart * n / total
        self.count = total

    @property
    def variance(self) -> float:
        """Of the population: squares over count; 0 before the first number."""
        return self._squares / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        return math.sqrt(self.variance)

    def normalise(self, values: Tensor, *, shift_mean: bool = True) -> Tensor:
        """(x - mean) / std, or x / std; as they are until two numbers have been seen.

        A std of less than 1e-4 is taken as 1e-4.
        """
        if self.count < 2:
            return values
        shifted = values - self.mean if shift_mean else values
        return shifted / max(self.std, 1e-4)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squares": self._squares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.mean = float(state["count"]), float(state["mean"])
        self._squares = float(state["squares"])


def clip_scores(
    scores: Float[Tensor, " n"], limit: float | None
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Scores held to +-limit, and 1 for each that was beyond; None holds none.

    Scores are normalised, weighted and added up before they are clipped, and clipped before the KL
    is taken off, so that weights do not depend on scales.
    """
    positive("clip_scores", limit=limit)
    if limit is None:
        return scores, torch.zeros_like(scores)
    return scores.clamp(-limit, limit), (scores.abs() > limit).to(scores.dtype)
