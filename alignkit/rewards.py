"""Rewards put together with weights, and what rewards of yes and no have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from alignkit.errors import ConfigError, DataError
from alignkit.protocols import Collective, Reward
from alignkit.scoring import Score, scores_of

Outputs = Literal["logit", "probability"]
"""What a model of a yes or no returns: log-odds, as a reward-model folder does, or P(yes)."""

SMALLEST = 1e-6
"""Probabilities are kept this far from 0 and 1."""


def bind(reward: Reward, processes: Collective) -> None:
    """Tell a reward that looks at the whole batch where the rest of it is."""
    if hasattr(reward, "bind"):
        reward.bind(processes)


class WeightedReward:
    """r = sum_i weight_i * r_i, as named parts: part i is weight_i * r_i.

    Args:
        parts: name -> (reward, weight).

    Raises:
        ConfigError: there is no part, or a weight is not finite.
    """

    def __init__(self, parts: Mapping[str, tuple[Reward, float]]) -> None:
        if not parts:
            raise ConfigError("A sum of rewards needs at least one; got none.")
        for name, (_, weight) in parts.items():
            finite(f"The weight of reward {name!r}", weight)
        self.parts = dict(parts)

    def bind(self, processes: Collective) -> None:
        for reward, _ in self.parts.values():
            bind(reward, processes)

    def __call__(
        self,
        prompts: Sequence[Any],
        responses: Sequence[Any],
        rows: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, list[Score]]:
        """Weighted parts by name, each with one number per answer; missing stays missing.

        A reward that has parts of its own has them as "name/part".
        """
        found = {}
        for name, (reward, weight) in self.parts.items():
            scores = scores_of(reward, name, prompts, responses, rows)
            total = scores.pop("")
            named = {f"{name}/{part}": values for part, values in scores.items()} or {name: total}
            for part, values in named.items():
                found[part] = [None if one is None else weight * one for one in values]
        return found


def chance(score: Score, outputs: Outputs, name: str) -> Score:
    """A probability, within 1e-6 of neither 0 nor 1."""
    if score is None:
        return None
    if outputs == "probability":
        if not 0 <= score <= 1:
            raise DataError(
                f"The reward {name!r} was said to return probabilities; it returned {score}. Write "
                "outputs='logit' for log-odds."
            )
        found = score
    else:
        found = 1 / (1 + math.exp(-score)) if score > -700 else 0.0
    return min(max(found, SMALLEST), 1 - SMALLEST)


def log_chance(score: Score, outputs: Outputs, name: str) -> Score:
    """Its logarithm."""
    if chance(score, outputs, name) is None:
        return None
    assert score is not None
    # Without the loss of digits near 0, so that a rule that is surely kept adds nothing.
    if outputs == "logit":
        return -math.log1p(math.exp(-max(score, logit(SMALLEST))))
    return math.log(max(score, SMALLEST))


def logit(chance: float) -> float:
    """Its log-odds."""
    return math.log(chance) - math.log1p(-chance)


def finite(what: str, value: float) -> None:
    """Refuse a weight that is not."""
    if not math.isfinite(value):
        raise ConfigError(f"{what} must be finite; got {value}.")


def outputs_of(given: Any) -> Outputs:
    """What was given, if it is one of the two."""
    if given not in ("logit", "probability"):
        raise ConfigError(f"outputs is 'logit' or 'probability'; got {given!r}.")
    found: Outputs = given
    return found
