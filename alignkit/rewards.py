"""Rewards put together: a weighted sum of several, each kept as a named part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.errors import ConfigError, DataError
from alignkit.protocols import Reward

Score = float | None


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
            if not math.isfinite(weight):
                raise ConfigError(f"The weight of reward {name!r} must be finite; got {weight}.")
        self.parts = dict(parts)

    def __call__(
        self,
        prompts: Sequence[Any],
        responses: Sequence[Any],
        rows: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, list[Score]]:
        """Weighted parts by name, each with one number per answer; missing stays missing.

        Raises:
            DataError: a reward returned named parts of its own, which would have no weight, or
                another count than asked.
        """
        found = {}
        for name, (reward, weight) in self.parts.items():
            scores = reward(prompts, responses, rows)
            if isinstance(scores, Mapping) or len(scores) != len(responses):
                count = "named parts" if isinstance(scores, Mapping) else len(scores)
                raise DataError(
                    f"A reward in a sum returns one number per answer; {name!r} returned {count} "
                    f"for {len(responses)}."
                )
            found[name] = [None if one is None else weight * float(one) for one in scores]
        return found
