"""Files whose rows are read from any of their units on: lines, records, row groups."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from alignkit.errors import DataError

Row = dict[str, Any]
UNIT = 256
"""Rows of a unit of lines."""


class Shard(Protocol):
    """A part of the data that lies in one place."""

    @property
    def units(self) -> Sequence[int]:
        """Rows of each unit; a single 0 for a stream of unknown length."""
        ...

    def read(self, unit: int, skip: int) -> Iterator[tuple[int, Row]]:
        """The rows of a unit from the `skip`-th on, each with its number in the shard."""
        ...


class Lines:
    """A .jsonl file. The byte at which every unit begins is found once; numbers count all lines."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._starts, lines, end = [0], 0, 0
        with file.open("rb") as opened:
            while chunk := opened.read(2**20):
                ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10)
                first = -lines % UNIT or UNIT
                # The unit after line number k * UNIT begins behind that line's end.
                self._starts += (end + ends[first - 1 :: UNIT] + 1).tolist()
                lines, end = lines + len(ends), end + len(chunk)
                last = chunk[-1:]
        if end:
            lines += last != b"\n"
        full, rest = divmod(lines, UNIT)
        self.units = [UNIT] * full + ([rest] if rest else [])

    def read(self, unit: int, skip: int) -> Iterator[tuple[int, Row]]:
        with self._file.open("rb") as opened:
            opened.seek(self._starts[unit])
            for place in range(self.units[unit]):
                line = opened.readline()
                if place >= skip and line.strip():
                    yield unit * UNIT + place, self._parse(line, unit * UNIT + place + 1)

    def _parse(self, line: bytes, number: int) -> Row:
        where = f"{self._file}, line {number}"
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not valid JSON: {error}.") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{where} must be UTF-8 text; {error}.") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: a line is one JSON object; got {type(row).__name__}.")
        return row


class Records:
    """A .csv file; a record may span lines."""

    def __init__(self, file: Path) -> None:
        self._file = file
        csv.field_size_limit(2**31 - 1)
        self._starts: list[int] = []
        count = 0
        with file.open("rb") as opened:
            lines = _Fed(opened)
            reader = csv.reader(lines)
            self._header = next(reader, [])
            while True:
                start = lines.position
                if next(reader, None) is None:
                    break
                if count % UNIT == 0:
                    self._starts.append(start)
                count += 1
        full, rest = divmod(count, UNIT)
        self.units = [UNIT] * full + ([rest] if rest else [])

    def read(self, unit: int, skip: int) -> Iterator[tuple[int, Row]]:
        with self._file.open("rb") as opened:
            opened.seek(self._starts[unit])
            reader = csv.reader(_Fed(opened))
            for place in range(self.units[unit]):
                record = next(reader)
                if place < skip or not record:
                    continue
                number = unit * UNIT + place
                if len(record) != len(self._header):
                    raise DataError(
                        f"{self._file}, record {number + 1}: a record has as many fields as the "
                        f"header ({len(self._header)}); got {len(record)}. Quote fields that hold "
                        "commas."
                    )
                yield number, dict(zip(self._header, record, strict=True))


class _Fed:
    """Lines for the csv reader, and how far it has read: it asks for one when it needs one."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened
        self.position = opened.tell()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._opened.readline()
        if not line:
            raise StopIteration
        encoding = "utf-8-sig" if self.position == 0 else "utf-8"
        self.position += len(line)
        text: str = line.decode(encoding)
        return text


class RowGroups:
    """A .parquet file; a row group is read as a whole."""

    def __init__(self, file: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        try:
            self._opened = pyarrow.parquet.ParquetFile(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{file} must be a parquet file; {error}.") from error
        meta = self._opened.metadata
        self.units = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
        self._before = [0, *accumulate(self.units)]

    def read(self, unit: int, skip: int) -> Iterator[tuple[int, Row]]:
        number = self._before[unit] + skip
        table = self._opened.read_row_group(unit).slice(skip)
        for batch in table.to_batches(max_chunksize=UNIT):
            for row in batch.to_pylist():
                yield number, row
                number += 1
