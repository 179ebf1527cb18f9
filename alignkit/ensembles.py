"""Several reward models as one: their mean, their worst, or their mean less their spread.

    mean                 sum_i r_i / n
    min                  min_i r_i                               Coste et al. 2023 (2310.02743)
    mean_minus_std       mean - c sqrt(sum_i (r_i - mean)^2 / n)

Bradley-Terry scores float by a constant, so members are to be centred first, such as by
`ModelReward.centred_on` or by `RewardModel(centering=...)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alignkit.errors import ConfigError, DataError, refuse_unknown
from alignkit.protocols import Reward

Score = float | None


def _mean(values: Sequence[float], weight: float) -> float:
    return math.fsum(values) / len(values)


def _worst(values: Sequence[float], weight: float) -> float:
    return min(values)


def _cautious(values: Sequence[float], weight: float) -> float:
    mean = _mean(values, weight)
    return mean - weight * math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))


COMBINATIONS: Mapping[str, Callable[[Sequence[float], float], float]] = {
    "mean": _mean,
    "min": _worst,
    "mean_minus_std": _cautious,
}


class EnsembleReward:
    """A reward of several that score the same answers.

    Args:
        members: rewards that give one number per answer.
        combine: a name of `COMBINATIONS`.
        weight: of the spread, for "mean_minus_std".

    Raises:
        ConfigError: there are fewer than two members, or no such combination.
    """

    name = "ensemble"

    def __init__(
        self, members: Sequence[Reward], combine: str = "mean", *, weight: float = 1.0
    ) -> None:
        refuse_unknown("combination of rewards", combine, COMBINATIONS)
        if len(members) < 2:
            raise ConfigError(f"An ensemble has at least two members; got {len(members)}.")
        self.members = list(members)
        self.combine = COMBINATIONS[combine]
        self.weight = weight

    def __call__(
        self,
        prompts: Sequence[Any],
        responses: Sequence[Any],
        rows: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Score]:
        """One number per answer; missing where a member has none.

        Raises:
            DataError: a member gives named parts, or another count than asked.
        """
        columns = []
        for member in self.members:
            scores = member(prompts, responses, rows)
            if isinstance(scores, Mapping) or len(scores) != len(responses):
                raise DataError(
                    "A member of an ensemble returns one number per answer; one returned "
                    f"{'named parts' if isinstance(scores, Mapping) else len(scores)} for "
                    f"{len(responses)}."
                )
            columns.append(list(scores))
        return [self._one(values) for values in zip(*columns, strict=True)]

    def _one(self, values: Sequence[Score]) -> Score:
        given = [float(value) for value in values if value is not None]
        return self.combine(given, self.weight) if len(given) == len(values) else None
