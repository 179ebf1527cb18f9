"""Lists of prompts as people keep them: one a line, or a column of a table.

PartiPrompts is a .tsv with a column Prompt, the benchmark of HPSv2 one .json list per style.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.errors import DataError, nearest
from alignkit.places import SUFFIXES
from alignkit.rows import Row, read_rows

NAMES = ("prompt", "caption", "instruction", "question", "text")
"""Columns that are taken for the prompt, in this order, whatever their case."""
FILES = (".txt", ".tsv", *SUFFIXES)


def read_prompts(given: Any, column: str | None = None) -> list[Row]:
    """Rows with `prompt`, and what else stood in the table.

    Args:
        given: a .txt file with a prompt a line; a .jsonl, .json (rows, or a bare list of strings),
            .csv, .tsv or .parquet file; anything else that `align` takes as data; or a list of
            prompts or rows.
        column: of the prompts; None looks for one of `NAMES`.

    Raises:
        DataError: there is no such file or column, or a row without a prompt.
    """
    rows, name, folder = _rows(given)
    if not rows:
        raise DataError(f"A list of prompts holds at least one; {name} is empty.")
    if not isinstance(rows[0], Mapping):
        rows = [{"prompt": one} for one in rows]
        column = "prompt"
    column = _column(rows[0], column, name)
    found = []
    for number, row in enumerate(rows):
        prompt = row.get(column)
        blank = not isinstance(prompt, (str, Sequence)) or not (
            prompt.strip() if isinstance(prompt, str) else prompt
        )
        if blank:
            raise DataError(
                f"Row {number} (counted from 0) of {name} has no prompt: column {column!r} holds "
                f"{prompt!r}. Remove the row."
            )
        rest = {key: value for key, value in row.items() if key != column}
        place = {} if folder is None else {"folder": folder}
        found.append({**rest, **place, "prompt": prompt})
    return found


def _rows(given: Any) -> tuple[list[Any], str, str | None]:
    """Prompts or rows, what errors call them, and what their paths are relative to."""
    if isinstance(given, (str, Path)):
        path = Path(given).expanduser()
        if path.is_file() and path.suffix.lower() not in FILES:
            raise DataError(f"Lists of prompts end in {', '.join(FILES)}; got {path}.")
        reader = _READERS.get(path.suffix.lower()) if path.is_file() else None
        if reader is not None and (rows := reader(path)) is not None:
            return rows, str(path), str(path.parent)
    elif isinstance(given, Sequence):
        return list(given), "the given list", None
    data = read_rows(given)
    return list(data), data.name, None if data.folder is None else str(data.folder)


def _lines(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8-sig")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _bare_list(path: Path) -> list[Any] | None:
    """A JSON list of strings; None for anything else, which `read_rows` knows."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        return None
    whole = isinstance(found, list) and all(isinstance(one, str) for one in found)
    return found if whole else None


def _tabbed(path: Path) -> list[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for number, row in enumerate(rows):
        if None in row:
            raise DataError(f"{path}: row {number} has more fields than the header.")
    return rows


_READERS = {".txt": _lines, ".json": _bare_list, ".tsv": _tabbed}


def _column(first: Mapping[str, Any], wanted: str | None, name: str) -> str:
    columns = [str(key) for key in first]
    if wanted is not None:
        if wanted in columns:
            return wanted
        raise DataError(
            f"{name} has no column {wanted!r}.{nearest(wanted, columns)} Columns found: "
            f"{', '.join(columns)}."
        )
    folded = {key.casefold(): key for key in reversed(columns)}
    for known in NAMES:
        if known in folded:
            return folded[known]
    raise DataError(
        f"{name} has none of the columns {', '.join(NAMES)}. Name the prompts' column with "
        f"prompt_column. Columns found: {', '.join(columns)}."
    )
