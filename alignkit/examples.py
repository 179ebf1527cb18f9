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

    def fingerprint(self) -> str:
        """A digest of the rows: other data of equal length has another."""
        ...


class StreamedExamples(Protocol):
    """A wing's data that is prepared a part at a time."""

    stream: Any
    """`alignkit.stream.Stream` of the raw rows."""

    def prepare(self, numbered: Sequence[tuple[int, Mapping[str, Any]]]) -> Examples:
        """The usable ones of some raw rows, given with their numbers, in their order."""
        ...

    def merge(self, rows: Sequence[tuple[Examples, int]]) -> Examples:
        """Single rows of what `prepare` returned, together."""
        ...
