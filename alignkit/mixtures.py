"""Several data sets as one, each row drawn from one of them by weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.errors import ConfigError


@dataclass(frozen=True)
class Mixture:
    """Data sets and the shares of the rows that come from them.

        Mixture({"helpful.jsonl": 0.7, "harmless.jsonl": 0.3})
        Mixture([(rows, 2), ("more.parquet", 1)])

    An epoch is as many rows as all sets have together. Each set is gone through in an order of its
    own, again and again, so that none of its rows is left out or comes twice before the others have
    come once; a small set with a large weight repeats sooner.

    Attributes:
        sets: data (as `align` takes it) -> weight above 0, or such pairs; weights need not add up
            to 1.
    """

    sets: Mapping[str, float] | Sequence[tuple[Any, float]]

    def __post_init__(self) -> None:
        if not self.entries():
            raise ConfigError("A mixture has at least one data set; got none.")
        for name, _, weight in self.entries():
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number or not 0 < weight < math.inf:
                raise ConfigError(
                    f"The weight of a set in a mixture is a number above 0; got {weight!r} for "
                    f"{name}. Leave the set out, or give it a weight."
                )

    def entries(self) -> list[tuple[str, Any, float]]:
        """(name, data, weight) of each set; names are distinct."""
        if isinstance(self.sets, Mapping):
            pairs: Sequence[tuple[Any, float]] = list(self.sets.items())
        else:
            pairs = list(self.sets)
        named = [str(data) if _is_place(data) else "rows" for data, _ in pairs]
        return [
            (name if named.count(name) == 1 else f"{name} ({place})", data, weight)
            for place, (name, (data, weight)) in enumerate(zip(named, pairs, strict=True))
        ]


def first_set(data: Any) -> Any:
    """The first set of a mixture; anything else as it is."""
    return data.entries()[0][1] if isinstance(data, Mixture) else data


def _is_place(data: Any) -> bool:
    return isinstance(data, str) or hasattr(data, "__fspath__")


def quotas(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many of an epoch's rows come from each set: in proportion, by largest remainders."""
    total, scale = sum(sizes), sum(weights)
    exact = [total * weight / scale for weight in weights]
    found = [int(value) for value in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (found[i] - exact[i], i))
    for place in by_rest[: total - sum(found)]:
        found[place] += 1
    return found
