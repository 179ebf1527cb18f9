"""Rows to preference pairs: two layouts, ties, identical pairs, and what to do with bad rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image
from tqdm.auto import tqdm

from alignkit.errors import ConfigError, DataError, nearest, refuse_unknown
from alignkit.options import ImageOptions
from alignkit.rows import Row, Rows, read_rows
from alignkit_diffusion.images import BadRow, digest, open_image

PLAIN = ("prompt", "chosen", "rejected")
PICK_A_PIC = ("caption", "jpg_0", "jpg_1", "label_0")
OPTIONAL = ("weight", "margin", "p_chosen")
COLUMNS = (*PLAIN, *PICK_A_PIC, "label_1", *OPTIONAL)


@dataclass(frozen=True)
class Picture:
    """One image of a row, without its pixels.

    Attributes:
        row, column: where it came from, to decode it again and to name it in errors.
        digest: hash of its decoded pixels.
        height, width: as it is, upright, in pixels.
    """

    row: int
    column: str
    digest: str
    height: int
    width: int


@dataclass(frozen=True)
class Pair:
    """One usable row. The chosen image comes first; in a tie the order means nothing."""

    row: int
    prompt: str
    chosen: Picture
    rejected: Picture
    tie: bool = False
    weight: float | None = None
    margin: float | None = None
    p_chosen: float | None = None


def open_rows(data: Any, options: ImageOptions) -> Rows:
    """The rows of `data`, their columns checked on the first one.

    Raises:
        ConfigError: `options.columns` renames something that is no column of image rows.
        DataError: the data is missing, empty or broken, or a column is missing.
    """
    for ours in options.columns:
        refuse_unknown("column in data_options.columns", ours, COLUMNS)
    rows = read_rows(data, columns=options.columns)
    found = rows[0]
    missing = _missing(found)
    if missing:
        names = sorted(map(str, found))
        hints = "".join(nearest(name, names) for name in missing)
        raise DataError(
            f"Image pairs have the columns {', '.join(PLAIN)}, or Pick-a-Pic's "
            f"{', '.join(PICK_A_PIC)}; {rows.name} lacks {', '.join(map(repr, missing))}.{hints} "
            f"Columns found: {', '.join(names)}. Rename with data_options.columns, such as "
            f"{{{missing[0]!r}: 'its name in the data'}}."
        )
    return rows


def _missing(row: Row) -> list[str]:
    """The missing columns of the layout that the row is nearer to."""
    have = set(row) | ({"caption", "prompt"} if {"caption", "prompt"} & set(row) else set())
    have |= {"label_0"} if "label_1" in row else set()
    layouts = [[name for name in layout if name not in have] for layout in (PLAIN, PICK_A_PIC)]
    return min(layouts, key=len)


def prompt_of(row: Row) -> str:
    """The prompt of a row; the empty string is one.

    Raises:
        BadRow: there is none, or it is not a string.
    """
    prompt = row.get("prompt", row.get("caption"))
    if not isinstance(prompt, str):
        raise BadRow("no prompt", f"a prompt is a string; got {type(prompt).__name__}")
    return prompt


def read_pairs(
    rows: Rows,
    options: ImageOptions,
    skipped: Counter[str],
    on_image: Callable[[Picture, Image], None],
) -> Iterator[Pair]:
    """The usable pairs, in the order of the rows.

    Args:
        rows: from `open_rows`.
        options: `ties`, `identical_pairs` and `on_bad_row` decide what is left out.
        skipped: counted up: reason -> rows left out.
        on_image: given each image of each usable pair while its pixels are there.

    Raises:
        DataError: a row is bad, a tie, or an identical pair, and the options say "error".
    """
    for index in tqdm(range(len(rows)), desc="Reading image pairs", leave=False, disable=None):
        try:
            found = _read_pair(rows, index, options)
        except BadRow as bad:
            if options.on_bad_row == "error":
                raise DataError(
                    f"{rows.where(index)}: {bad}. Repair the row, or leave such rows out with "
                    'data_options.on_bad_row="skip".'
                ) from bad
            skipped[bad.reason] += 1
            continue
        if isinstance(found, str):
            skipped[found] += 1
            continue
        pair, images = found
        for picture, image in zip((pair.chosen, pair.rejected), images, strict=True):
            on_image(picture, image)
        yield pair


def _read_pair(
    rows: Rows, index: int, options: ImageOptions
) -> tuple[Pair, tuple[Image, Image]] | str:
    """The pair of a row and its images, or why the options leave it out."""
    row = rows[index]
    prompt = prompt_of(row)
    first, second, tie = _sides(row)
    if tie and options.ties != "half":
        return _left_out("tie", options.ties, rows, index, "ties", "a pair has a winner", "drop")
    numbers = {name: _number(row, name) for name in OPTIONAL}
    one, image_one = _picture(rows, row, index, first)
    two, image_two = _picture(rows, row, index, second)
    if one.digest == two.digest and options.identical_pairs != "keep":
        rule = "the two images of a pair differ"
        how = options.identical_pairs
        return _left_out("identical pair", how, rows, index, "identical_pairs", rule, "skip")
    if tie:
        # The log-odds of an even preference are 0: both orders count one half.
        numbers["p_chosen"] = 0.5
    return Pair(index, prompt, one, two, tie, **numbers), (image_one, image_two)


def _left_out(
    reason: str, how: str, rows: Rows, index: int, option: str, rule: str, fix: str
) -> str:
    if how == "error":
        raise DataError(
            f"{rows.where(index)}: {rule}; this one is a {reason}. Leave such rows out with "
            f'data_options.{option}="{fix}".'
        )
    return reason


def _sides(row: Row) -> tuple[str, str, bool]:
    """The columns of the chosen and the rejected image, and whether that is a tie."""
    if "chosen" in row or "rejected" in row or not {"jpg_0", "jpg_1"} & set(row):
        return "chosen", "rejected", False
    label = _label(row, "label_0")
    other = _label(row, "label_1")
    if label is None and other is None:
        raise BadRow("no label", "Pick-a-Pic rows have label_0 or label_1; got neither")
    if label is None:
        label = 1.0 - (other or 0.0)
    if other is not None and label + other != 1:
        raise BadRow("bad label", f"label_0 and label_1 add up to 1; got {label} and {other}")
    winner, loser = ("jpg_0", "jpg_1") if label >= 0.5 else ("jpg_1", "jpg_0")
    return winner, loser, label == 0.5


def _label(row: Row, name: str) -> float | None:
    value = _number(row, name)
    if value not in (None, 0.0, 0.5, 1.0):
        raise BadRow("bad label", f"{name} is 0, 0.5 or 1; got {row[name]!r}")
    return value


def _number(row: Row, name: str) -> float | None:
    """A number of a row; None where the column is absent or empty."""
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    ranges = {"weight": (0.0, math.inf), "p_chosen": (0.0, 1.0)}
    low, high = ranges.get(name, (-math.inf, math.inf))
    if not (math.isfinite(number) and low <= number <= high):
        within = {"weight": " of at least 0", "p_chosen": " between 0 and 1"}.get(name, "")
        raise BadRow(f"bad {name}", f"{name} is a finite number{within}; got {value!r}")
    return number


def _picture(rows: Rows, row: Row, index: int, column: str) -> tuple[Picture, Image]:
    if column not in row:
        raise BadRow("no image", f"there is no column {column!r} in this row")
    try:
        image = open_image(row[column], rows.folder)
    except BadRow as bad:
        raise BadRow(bad.reason, f"column {column!r}: {bad}") from bad
    return Picture(index, column, digest(image), image.height, image.width), image


def reopen(rows: Rows, picture: Picture) -> Image:
    """Decode an image again.

    Raises:
        DataError: it has changed or gone since it was read.
    """
    try:
        image = open_image(rows[picture.row][picture.column], rows.folder)
    except BadRow as bad:
        raise DataError(f"{where(rows, picture)}: {bad}; it was readable before.") from bad
    if digest(image) != picture.digest:
        raise DataError(
            f"{where(rows, picture)}: the image changed while it was trained on. Start the run "
            "anew."
        )
    return image


def where(rows: Rows, picture: Picture) -> str:
    """How errors name an image: row, column, and its path if it has one."""
    source = rows[picture.row].get(picture.column)
    if isinstance(source, Mapping):
        source = source.get("path")
    path = f" ({source})" if isinstance(source, str) else ""
    return f"{rows.where(picture.row)}, column {picture.column!r}{path}"


def check_kind(kind: str) -> None:
    """Raise `ConfigError` unless image rows of this kind can be read."""
    if kind != "pairs":
        raise ConfigError(
            f"Image policies train on pairs; got a method that needs {kind!r}. Use a pairwise "
            "loss, such as DPO()."
        )
