"""Rows that are read when they are needed: files larger than memory, folders of shards, streams.

A stream is made of units (some hundred lines, a row group), each of which can be read from its
start. So any place in it can be found again, and units can be put in any order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any

from alignkit.errors import DataError
from alignkit.hub import is_dataset, load_hub, undecoded
from alignkit.places import is_missing
from alignkit.rows import Row, Rows, check_renames, files_of, read_rows, renamed
from alignkit.stream_files import UNIT, Lines, Records, RowGroups, Shard

READERS: Mapping[str, Callable[[Path], Shard]] = {
    ".jsonl": Lines,
    ".csv": Records,
    ".parquet": RowGroups,
}
"""Format of a file -> how it is read from any of its units on."""

STREAM_FROM = 2 * 2**30
"""Bytes of files from which on streaming="auto" streams them."""


class Stream:
    """The rows of some data, by units.

    Args:
        shards: with the rows.
        name: of the data.
        columns: our column name -> the data's.

    Attributes:
        num_units: of all shards.
        num_rows: of all shards, blank lines counted; None where that is not known.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        name: str,
        columns: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.name = name
        self._shards = shards
        self._columns = dict(columns)
        self._first_units = [0, *accumulate(len(shard.units) for shard in shards)]
        self._first_rows = [0, *accumulate(sum(shard.units) for shard in shards)]
        self.num_units = self._first_units[-1]
        self.num_rows = self._first_rows[-1] or None

    def read(self, unit: int, skip: int = 0) -> Iterator[tuple[int, Row]]:
        """The rows of a unit from the `skip`-th on, each with its number in the data."""
        place = bisect_right(self._first_units, unit) - 1
        first = self._first_rows[place]
        for number, row in self._shards[place].read(unit - self._first_units[place], skip):
            yield first + number, renamed(row, self._columns)

    def offset(self, unit: int, number: int) -> int:
        """The place in its unit of the row with this number."""
        place = bisect_right(self._first_units, unit) - 1
        shard, inner = self._shards[place], unit - self._first_units[place]
        return number - self._first_rows[place] - sum(shard.units[:inner])

    def __iter__(self) -> Iterator[Row]:
        return (row for unit in range(self.num_units) for _, row in self.read(unit))

    def where(self, index: int) -> str:
        """How errors name a row."""
        return f"Row {index} (counted from 0) of {self.name}"

    def shape(self) -> list[int]:
        """What tells other data of the same name: the rows of each shard."""
        return [sum(shard.units) for shard in self._shards]


def open_stream(
    data: Any, *, columns: Mapping[str, str] = MappingProxyType({}), split: str = "train"
) -> Stream:
    """Open `data` as a stream of rows; of files, their lines are counted once.

    Args:
        data: as for `read_rows`; a .json file, which is one value, cannot be streamed.
        columns: our column name -> the data's.
        split: of a folder, a hub name or a mapping of datasets.

    Raises:
        DataError: the data is missing, empty, or cannot be streamed.
    """
    shards, name = _shards(data, split)
    raw = next((row for _, row in Stream(shards, name=name).read(0)), None) if shards else None
    if raw is None:
        raise DataError(f"Data must hold at least one row; {name} is empty.")
    check_renames(raw, columns, name)
    return Stream(shards, name=name, columns=columns)


def is_streamed(data: Any, streaming: bool | str) -> bool:
    """Whether data is streamed; "auto" streams what has no length, and files of 2 GiB or more."""
    if streaming != "auto":
        return bool(streaming)
    if is_dataset(data):
        return not hasattr(data, "__len__")
    files = _files(data, "train") if isinstance(data, (str, Path)) else None
    if not files or any(file.suffix.lower() not in READERS for file in files):
        return False
    return sum(file.stat().st_size for file in files) >= STREAM_FROM


def _files(place: str | Path, split: str) -> list[Path] | None:
    """The files of a path; None where there are none."""
    path = Path(place).expanduser()
    if path.is_dir():
        return files_of(path, split)
    return [path] if path.is_file() else None


def _shards(data: Any, split: str) -> tuple[list[Shard], str]:
    if isinstance(data, (str, Path)):
        if files := _files(data, split):
            return [_open(file) for file in files], str(data)
        if not Path(data).expanduser().exists() and not is_missing(data):
            found = load_hub(str(data), split, streaming=True)
            return [_Sequential(undecoded(found, split, name=str(data)))], str(data)
    elif is_dataset(data) and not hasattr(data, "__len__"):
        name = f"the given {type(data).__name__}"
        return [_Sequential(undecoded(data, split, name=name))], name
    rows = read_rows(data, split=split)
    return [_Indexed(rows)], rows.name


def _open(file: Path) -> Shard:
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(
            f"Data that is streamed is .jsonl, .csv or .parquet; {file} is one value, read as a "
            "whole. Write it as .jsonl, or set data_options.streaming=False."
        )
    return reader(file)


class _Sequential:
    """A `datasets.IterableDataset`: one unit, of unknown length."""

    units = (0,)

    def __init__(self, data: Any) -> None:
        self._data = data

    def read(self, unit: int, skip: int) -> Iterator[tuple[int, Row]]:
        data = self._data.skip(skip) if skip else self._data
        return enumerate(data, start=skip)


class _Indexed:
    """Rows that are there by number."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        full, rest = divmod(len(rows), UNIT)
        self.units = [UNIT] * full + ([rest] if rest else [])

    def read(self, unit: int, skip: int) -> Iterator[tuple[int, Row]]:
        start = unit * UNIT
        return ((i, self._rows[i]) for i in range(start + skip, start + self.units[unit]))
