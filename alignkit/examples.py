"""The seam between a wing's prepared data and the source that makes batches of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from alignkit.batches import Batch


class Examples(Protocol):
    """A wing's prepared data: rows by number."""

    skipped: Mapping[str, int]
    """Reason -> how many rows were left out by policy."""
    labels: Any
    """`alignkit.labels.Labels` of the usable rows."""

    def __len__(self) -> int: ...

    def collate(self, indices: Sequence[int], epochs: Sequence[int]) -> Batch:
        """The given rows as a batch; `epochs` (same length) keys their augmentation.

        `position` is filled in by the source.
        """
        ...

    def mismatched(self, indices: Sequence[int]) -> list[int]:
        """For each of a global batch's rows the place of the next one, around the end, that has
        another prompt and a weight above 0; its own where there is none.
        """
        ...
