"""From whatever holds rows to a sequence of dicts: files, folders, hub names, datasets, lists.

Both wings read through here, so that a file format, a renamed column or a broken line is handled,
and named in errors, in the same way everywhere.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, overload

from alignkit.errors import DataError, nearest
from alignkit.hub import is_dataset, load_hub, undecoded
from alignkit.places import SUFFIXES, is_missing
from alignkit.shards import SHARD_SUFFIXES, SHARDED, shards_of

Row = dict[str, Any]


class Rows(Sequence[Row]):
    """Rows by number. What lies on disk stays there until a row is asked for, where the format
    allows.

    Attributes:
        name: what errors call the data: a path, a hub name, or "the given list".
        folder: what relative paths in the rows are relative to; None for data without a place.
        sealed: the rows hold all that is theirs; a path in one is not to be followed.
    """

    def __init__(
        self,
        size: int,
        get: Callable[[int], Mapping[str, Any]],
        *,
        name: str,
        folder: Path | None = None,
        lines: Sequence[int] | None = None,
        columns: Mapping[str, str] = MappingProxyType({}),
        sealed: bool = False,
    ) -> None:
        self._size = size
        self._get = get
        self._lines = lines
        self._columns = dict(columns)
        self.name = name
        self.folder = folder
        self.sealed = sealed

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._size))]
        if not -self._size <= index < self._size:
            raise IndexError(index)
        index %= self._size
        found = self._get(index)
        if not isinstance(found, Mapping):
            raise DataError(
                f"{self.where(index)}: a row is a dict of columns; got {type(found).__name__}."
            )
        return renamed(found, self._columns)

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(self._size))

    def where(self, index: int) -> str:
        """How errors name a row: its number from 0, the data, and the line if it has one."""
        line = f", line {self._lines[index]}" if self._lines is not None else ""
        return f"Row {index} (counted from 0) of {self.name}{line}"


def renamed(found: Mapping[str, Any], columns: Mapping[str, str]) -> Row:
    """A row under our names."""
    row = dict(found)
    # Two passes, so that columns can also be swapped: {"chosen": "rejected", "rejected": "chosen"}.
    ours = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    for theirs in columns.values():
        row.pop(theirs, None)
    return {**row, **ours}


def read_rows(
    data: Any, *, columns: Mapping[str, str] = MappingProxyType({}), split: str = "train"
) -> Rows:
    """Open `data` as a sequence of rows.

    Args:
        data: a jsonl, json, csv, parquet or tar file (see `alignkit.tars`); a folder with
            `metadata.*` or `<split>.*` in one of these formats, with shards in parquet or tar
            files, or written by `datasets.save_to_disk`; a hub name; a
            `datasets.Dataset`, `IterableDataset` (read to its end) or `DatasetDict`; or a sequence
            of dicts.
        columns: our column name -> the data's.
        split: the split of a folder, hub name or `DatasetDict`.

    Columns that decode files when read (such as pictures in `datasets`) are handed over undecoded,
    as ``{"bytes": ..., "path": ...}``.

    Raises:
        DataError: the data is missing, empty, of an unknown format or broken (naming the line), or
            a renamed column is not in it.
    """
    if isinstance(data, str | Path):
        rows = _read_place(str(data), split)
    elif isinstance(data, Mapping) and not is_dataset(data):
        raise DataError(
            "Rows are a sequence of dicts, not one dict; got a dict with the keys "
            f"{', '.join(map(repr, list(data)[:8]))}. Write [{{...}}, {{...}}]."
        )
    elif is_dataset(data):
        rows = _read_dataset(data, split, name=f"the given {type(data).__name__}")
    elif isinstance(data, Sequence) and not isinstance(data, bytes):
        rows = Rows(len(data), data.__getitem__, name="the given list")
    else:
        raise DataError(
            "Data is a path, a hub name, a datasets.Dataset or a list of dicts; got "
            f"{type(data).__name__}."
        )
    if not len(rows):
        raise DataError(f"Data must hold at least one row; {rows.name} is empty.")
    check_renames(rows[0], columns, rows.name)
    rows._columns = dict(columns)
    return rows


def check_renames(first: Row, columns: Mapping[str, str], name: str) -> None:
    """Raise `DataError` for a column that is to be renamed and is not there."""
    for ours, theirs in columns.items():
        if theirs not in first:
            found = ", ".join(sorted(map(str, first)))
            raise DataError(
                f"data_options.columns maps {ours!r} to {theirs!r}, which {name} does not have."
                f"{nearest(theirs, map(str, first))} Columns found: {found}."
            )


def _read_place(place: str, split: str) -> Rows:
    path = Path(place).expanduser()
    if path.is_dir():
        return _read_folder(path, split)
    if path.is_file():
        return _read_file(path)
    refuse_missing(place)
    return _read_dataset(load_hub(place, split), split, name=place)


def refuse_missing(place: str | Path) -> None:
    """Raise `DataError` for a path that does not exist; a hub name is let through."""
    if is_missing(place):
        raise DataError(f"Data must exist; there is no file or folder {str(place)!r}.")


def _read_folder(folder: Path, split: str) -> Rows:
    if (files := files_of(folder, split)) is None:
        import datasets

        return _read_dataset(datasets.load_from_disk(str(folder)), split, name=str(folder))
    if len(files) == 1:
        return _read_file(files[0])
    if files[0].suffix.lower() in SHARDED:
        return _read_shards(files, str(folder))
    found = [row for file in files for row in _read_file(file)]
    return Rows(len(found), found.__getitem__, name=str(folder), folder=folder)


def files_of(folder: Path, split: str) -> list[Path] | None:
    """The files of a folder that hold a split; None for what `datasets.save_to_disk` wrote.

    Raises:
        DataError: if that cannot be told.
    """
    for stem in ("metadata", split):
        for suffix in SUFFIXES:
            if (folder / f"{stem}{suffix}").is_file():
                return [folder / f"{stem}{suffix}"]
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return None
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(files) == 1:
        return files
    if shards := shards_of(files, split):
        return shards
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
    raise DataError(
        "A data folder holds metadata.jsonl, metadata.json, metadata.csv or metadata.parquet (or "
        f"{split}.*), shards of one format ({', '.join(SHARD_SUFFIXES)}), or a dataset written by "
        f"datasets.save_to_disk; {folder} holds {found}. Name the file itself, or rename it to "
        "metadata.*."
    )


def _read_file(path: Path) -> Rows:
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        **{suffix: lambda path: _read_shards([path], str(path)) for suffix in SHARDED},
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"Data files end in {', '.join(SUFFIXES)}; got {path}. Convert it, or load it with "
            "datasets and hand over the Dataset."
        )
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be UTF-8 text; {error}.") from error


def _read_jsonl(path: Path) -> Rows:
    found: list[Row] = []
    lines: list[int] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not valid JSON: {error}.") from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}, line {number}: a line is one JSON object; got {type(row).__name__}."
                )
            found.append(row)
            lines.append(number)
    return Rows(len(found), found.__getitem__, name=str(path), folder=path.parent, lines=lines)


def _read_json(path: Path) -> Rows:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = " One object per line is the .jsonl format." if error.msg == "Extra data" else ""
        raise DataError(f"{path}, line {error.lineno}: not valid JSON: {error}.{hint}") from error
    if not isinstance(found, list):
        raise DataError(
            f"A .json data file holds one list of objects; {path} holds a {type(found).__name__}."
        )
    return Rows(len(found), found.__getitem__, name=str(path), folder=path.parent)


def _read_csv(path: Path) -> Rows:
    found: list[Row] = []
    lines: list[int] = []
    csv.field_size_limit(2**31 - 1)  # the default refuses fields above 128 kB
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{path}, line {reader.line_num}: a line has as many fields as the header "
                        f"({len(reader.fieldnames or ())}); quote fields that hold commas."
                    )
                found.append(row)
                lines.append(reader.line_num)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}.") from error
    return Rows(len(found), found.__getitem__, name=str(path), folder=path.parent, lines=lines)


def _read_shards(paths: Sequence[Path], name: str) -> Rows:
    suffix = paths[0].suffix.lower()
    found = SHARDED[suffix](paths)
    get, folder = found.__getitem__, paths[0].parent
    return Rows(len(found), get, name=name, folder=folder, sealed=suffix == ".tar")


def _read_dataset(data: Any, split: str, *, name: str) -> Rows:
    data = undecoded(data, split, name=name)
    if not hasattr(data, "__len__"):  # an IterableDataset
        found = list(data)
        return Rows(len(found), found.__getitem__, name=name)
    # A format such as "torch" would turn numbers and strings into tensors.
    data = data.with_format(None)
    return Rows(len(data), data.__getitem__, name=name)
