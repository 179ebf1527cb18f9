"""A fixed bank of draws for held-out rows: each row several times, each time on another draw.

A likelihood that is an estimate at a drawn timestep and noise needs more than one draw per row, and
the same ones at every evaluation. Draws are keyed by the place in the evaluation, so a row that
stands there several times has a bank of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.batches import Batch
from alignkit.examples import Examples


class Repeated:
    """Every row `times` times in a row: `Examples`.

    Args:
        examples: the rows.
        times: draws per row.
    """

    def __init__(self, examples: Examples, times: int) -> None:
        self.examples = examples
        self.times = times
        self.skipped: Mapping[str, int] = examples.skipped
        self.labels: Any = examples.labels

    def __len__(self) -> int:
        return len(self.examples) * self.times

    def fingerprint(self) -> str:
        return self.examples.fingerprint()

    def collate(self, indices: Sequence[int], epochs: Sequence[int]) -> Batch:
        return self.examples.collate([index // self.times for index in indices], epochs)

    def mismatched(self, indices: Sequence[int]) -> list[int]:
        return self.examples.mismatched([index // self.times for index in indices])
