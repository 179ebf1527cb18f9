"""Which row comes when: functions of the seed and of how many rows came before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from alignkit.draws import generator
from alignkit.mixtures import quotas


@dataclass(frozen=True)
class Part:
    """Rows that stand together in the examples and were drawn from one set of a mixture."""

    name: str
    size: int
    weight: float


class Shuffled:
    """Every epoch a permutation of `num` rows, keyed by (seed, epoch, *key)."""

    def __init__(self, num: int, seed: int, *, shuffle: bool, key: tuple[int, ...] = ()) -> None:
        self._num = num
        self._seed = seed
        self._shuffle = shuffle
        self._key = key
        self._order: tuple[int, Any] = (-1, None)

    def row(self, place: int) -> tuple[int, int]:
        """(epoch, row) of the `place`-th row of the whole run."""
        epoch, index = divmod(place, self._num)
        if not self._shuffle:
            return epoch, index
        if self._order[0] != epoch:
            draws = generator("shuffle", self._seed, epoch, *self._key)
            self._order = (epoch, draws.permutation(self._num))
        return epoch, int(self._order[1][index])


class Mixed:
    """Rows of a mixture: which set is next is an order of its own, keyed by (seed, epoch)."""

    def __init__(self, parts: Sequence[Part], seed: int, *, shuffle: bool) -> None:
        self.parts = parts
        self._seed = seed
        self._num = sum(part.size for part in parts)
        self._quotas = quotas([part.size for part in parts], [part.weight for part in parts])
        self._starts = [0, *accumulate(part.size for part in parts)]
        self._rows = [
            Shuffled(part.size, seed, shuffle=shuffle, key=(place,))
            for place, part in enumerate(parts)
        ]
        self._turns: tuple[int, Any, Any] = (-1, None, None)

    def row(self, place: int) -> tuple[int, int]:
        """(epoch of its set, row) of the `place`-th row of the whole run."""
        epoch, index = divmod(place, self._num)
        whose, earlier = self._epoch(epoch)
        part = int(whose[index])
        drawn = epoch * self._quotas[part] + int(earlier[index])
        own, row = self._rows[part].row(drawn)
        return own, self._starts[part] + row

    def drawn(self, rows: int) -> dict[str, int]:
        """How many of the first `rows` rows come from each set."""
        epochs, rest = divmod(rows, self._num)
        counts = np.bincount(self._epoch(epochs)[0][:rest], minlength=len(self.parts))
        return {
            part.name: epochs * quota + int(count)
            for part, quota, count in zip(self.parts, self._quotas, counts, strict=True)
        }

    def _epoch(self, epoch: int) -> tuple[Any, Any]:
        """Of every place of an epoch the set, and how many of its rows came before in it."""
        if self._turns[0] != epoch:
            whose = np.repeat(np.arange(len(self.parts)), self._quotas)
            whose = generator("mixture", self._seed, epoch).permutation(whose)
            earlier = np.zeros(self._num, dtype=np.int64)
            for part in range(len(self.parts)):
                mine = whose == part
                earlier[mine] = np.arange(mine.sum())
            self._turns = (epoch, whose, earlier)
        return self._turns[1], self._turns[2]
