"""Several processes in one, as threads: a `Collective` for what needs no gradient exchange."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Processes:
    """One of `size`, as `protocols.Collective` has it."""

    def __init__(self, rank: int, meeting: Barrier, table: list[Any]) -> None:
        self.rank, self.size = rank, len(table)
        self._meeting, self._table = meeting, table

    def _all(self, value: Tensor) -> list[Tensor]:
        self._table[self.rank] = value.clone()
        self._meeting.wait(timeout=10)
        found = list(self._table)
        self._meeting.wait(timeout=10)
        return found

    def sum(self, value: Tensor) -> Tensor:
        return torch.stack(self._all(value)).sum(0)

    def gather(self, value: Tensor) -> Tensor:
        return torch.cat(self._all(value))


def in_processes(size: int, work: Callable[[Processes], T]) -> list[T]:
    """What each of `size` processes returns, in rank order."""
    meeting, table = Barrier(size), [None] * size
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(Processes(rank, meeting, table)), range(size)))
