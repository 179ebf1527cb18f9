"""Rows of a stream, read once and forwards: what a cache makes of them is all that is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from alignkit.errors import DataError
from alignkit.rows import Row, Rows


def is_stream(data: Any) -> bool:
    """Whether `data` is a `datasets.IterableDataset`."""
    return any(cls.__name__ == "IterableDataset" for cls in type(data).__mro__)


class Streamed(Rows):
    """A `datasets.IterableDataset` as rows by number, of which only the last one is there.

    Raises:
        DataError: it is empty.
    """

    def __init__(self, data: Any, columns: Mapping[str, str]) -> None:
        for column, feature in (data.features or {}).items():
            if getattr(feature, "decode", False):
                data = data.cast_column(column, type(feature)(decode=False))
        self._stream = iter(data)
        self._number = -1
        self._row: Row = {}
        super().__init__(
            0, self._last, name=f"the given {type(data).__name__}", folder=None, columns=columns
        )
        if not self._advance():
            raise DataError(f"Data must hold at least one row; {self.name} is empty.")

    def __len__(self) -> int:
        raise DataError(
            "A stream has no length, and what was asked for needs one (scores beside the data, or "
            "an image again that the cache lost). Give a file, a folder or a datasets.Dataset."
        )

    def __getitem__(self, index: Any) -> Any:
        if index == self._number + 1 and not self._advance():
            raise IndexError(index)
        if index != self._number:
            raise DataError(
                f"Row {index} of {self.name} was read before, and a stream does not go back. Give "
                "a file, a folder or a datasets.Dataset, or run alignkit cache images again."
            )
        self._size = index + 1
        return super().__getitem__(index)

    def numbers(self) -> Iterator[int]:
        """The numbers of all rows; each row is there until the next number is asked for."""
        number = 0
        while number == self._number or self._advance():
            yield number
            number += 1

    def _advance(self) -> bool:
        try:
            self._row = dict(next(self._stream))
        except StopIteration:
            return False
        self._number += 1
        return True

    def _last(self, index: int) -> Row:
        return self._row
