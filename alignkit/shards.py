"""Data sets in many files: which of a folder's belong together, and parquet as rows by number.

Of a parquet file a row group or two are in memory at a time: a data set of images does not fit.
Pick-a-Pic v2 has 322 GB. Reading in order costs one read of each row group; a row out of order
costs one of its group.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from alignkit.errors import DataError
from alignkit.tars import TarRows

GROUPS_KEPT = 2


class ParquetRows:
    """The rows of parquet files, one after the other.

    Raises:
        DataError: a file is no parquet file, or its columns are not those of the first one.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        import pyarrow
        import pyarrow.parquet

        self._places: list[tuple[Path, int]] = []
        self._ends: list[int] = []
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._lock = Lock()
        columns: list[str] | None = None
        total = 0
        for path in paths:
            try:
                found = pyarrow.parquet.read_metadata(path)
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{path} must be a parquet file; {error}.") from error
            names = found.schema.to_arrow_schema().names
            columns = names if columns is None else columns
            if sorted(names) != sorted(columns):
                raise DataError(
                    f"The parquet files of one folder have the same columns; {path} has "
                    f"{', '.join(names)}, and {paths[0]} has {', '.join(columns)}. Give one of "
                    "them, or put them into folders of their own."
                )
            for group in range(found.num_row_groups):
                total += found.row_group(group).num_rows
                self._places.append((path, group))
                self._ends.append(total)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = bisect_right(self._ends, index)
        start = self._ends[place - 1] if place else 0
        with self._lock:
            table = self._read(place)
        return table.slice(index - start, 1).to_pylist()[0]

    def _read(self, place: int) -> Any:
        import pyarrow
        import pyarrow.parquet

        if place not in self._groups:
            path, group = self._places[place]
            try:
                with pyarrow.parquet.ParquetFile(path) as file:
                    self._groups[place] = file.read_row_group(group)
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{path}, row group {group}, cannot be read: {error}.") from error
            while len(self._groups) > GROUPS_KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(place)
        return self._groups[place]


SHARDED: dict[str, type[ParquetRows] | type[TarRows]] = {
    ".parquet": ParquetRows,
    ".tar": TarRows,
}
"""Formats of many files in a folder whose rows are read by number."""

SHARD_SUFFIXES = (*SHARDED, ".jsonl", ".csv")
"""Formats of which a folder may hold many files of one data set."""

_SPLITS = r"(train|val|valid|validation|dev|test)[-_.]"


def shards_of(files: Sequence[Path], split: str) -> list[Path]:
    """The shards of a split among the files of a folder; all files, where no splits are named."""
    found = [path for path in files if path.suffix.lower() in SHARD_SUFFIXES]
    of_split = [path for path in found if re.match(rf"{re.escape(split)}[-_.]", path.name)]
    if not of_split and any(re.match(_SPLITS, path.name) for path in files):
        return []
    chosen = of_split or (found if len(found) == len(files) else [])
    return chosen if len({path.suffix.lower() for path in chosen}) == 1 else []
