"""Image rows of every kind: layouts, ties, identical images, and what to do with bad rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL.Image import Image
from tqdm.auto import tqdm

from alignkit.columns import SAME, TIE, BadRow, Column, Sieve, check_columns, number
from alignkit.errors import ConfigError, refuse_unknown
from alignkit.labels import Label, group_label, pair_label, single_label
from alignkit.options import ImageOptions
from alignkit.rows import Row, Rows, read_rows
from alignkit_diffusion.pictures import Picture, open_picture
from alignkit_diffusion.score_labels import ScoreTable

LAYOUTS: Mapping[str, tuple[tuple[Column, ...], ...]] = {
    "pairs": (
        (("prompt", "caption"), "chosen", "rejected"),
        (("caption", "prompt"), "jpg_0", "jpg_1", ("label_0", "label_1")),
    ),
    "groups": ((("prompt", "caption"), "images", ("ranking", "scores")),),
    "unpaired": ((("prompt", "caption"), "image", "label"),),
}
"""Kind of rows -> the ways to write them; pairs also as Pick-a-Pic has them."""

IMAGE_COLUMNS = (("chosen", "rejected"), ("jpg_0", "jpg_1"), ("images",), ("image",))
"""The sets of columns that hold images; the first that a row has all of counts."""

OPTIONAL = ("weight", "margin", "p_chosen", "score_chosen", "score_rejected")
COLUMNS = {
    *OPTIONAL,
    *(
        name
        for layouts in LAYOUTS.values()
        for layout in layouts
        for column in layout
        for name in ([column] if isinstance(column, str) else column)
    ),
}


Source = tuple[str, int | None]
"""A column, and the place in it if it holds a list."""


@dataclass(frozen=True)
class ImageRow:
    """One usable row: a prompt and its images. Of a pair, the chosen one comes first."""

    number: int
    prompt: str
    pictures: tuple[Picture, ...]
    label: Label


def open_rows(data: Any, options: ImageOptions, kind: str | None = None) -> Rows:
    """The rows of `data`; of a given kind, their columns are checked on the first one.

    Raises:
        ConfigError: `options.columns` renames something that is no column of image rows.
        DataError: the data is missing, empty or broken, or a column is missing.
    """
    for ours in options.columns:
        refuse_unknown("column in data_options.columns", ours, COLUMNS)
    rows = read_rows(data, columns=options.columns)
    if kind is not None:
        check_columns(rows[0], kind, LAYOUTS, rows.name)
    return rows


def sources_of(row: Row) -> list[Source]:
    """Where the images of a row are, of any kind, in the order of its columns.

    Raises:
        BadRow: there are none.
    """
    for names in IMAGE_COLUMNS:
        if all(name in row for name in names):
            many = [(name, range(len(row[name])) if name == "images" else [None]) for name in names]
            return [(name, place) for name, places in many for place in places]
    told = ", or ".join(" and ".join(names) for names in IMAGE_COLUMNS)
    raise BadRow("no image", f"images stand in {told}; columns found: {', '.join(row)}")


def prompt_of(row: Row) -> str:
    """The prompt of a row; the empty string is one.

    Raises:
        BadRow: there is none, or it is not a string.
    """
    prompt = row.get("prompt", row.get("caption"))
    if not isinstance(prompt, str):
        raise BadRow("no prompt", f"a prompt is a string; got {type(prompt).__name__}")
    return prompt


def read_examples(
    rows: Rows,
    kind: str,
    options: ImageOptions,
    sieve: Sieve,
    on_image: Callable[[Picture, Image], None],
) -> Iterator[ImageRow]:
    """The usable rows, in their order.

    Args:
        rows: from `open_rows`.
        kind: "pairs", "groups" or "unpaired".
        options: `ties` and `identical_pairs` decide what is left out.
        sieve: leaves out, and counts.
        on_image: given each image of each usable row while its pixels are there.

    Raises:
        DataError: a row is bad, a tie, or an identical pair, and the options say "error".
    """
    table = _score_table(rows, kind, options)
    for index in tqdm(range(len(rows)), desc=f"Reading image {kind}", leave=False, disable=None):
        with sieve.guard(index):
            found = _read(rows, index, kind, options, sieve, table)
            if found is not None:
                row, images = found
                for picture, image in zip(row.pictures, images, strict=True):
                    on_image(picture, image)
                yield row


def _score_table(rows: Rows, kind: str, options: ImageOptions) -> ScoreTable | None:
    if options.labels is None:
        return None
    if kind != "pairs":
        raise ConfigError(
            "data_options.labels decides which image of a pair is chosen, and this run reads "
            f"{kind}. Take a loss of pairs, or leave labels out."
        )
    return ScoreTable(options.labels, len(rows))


def _read(
    rows: Rows, index: int, kind: str, options: ImageOptions, sieve: Sieve, table: ScoreTable | None
) -> tuple[ImageRow, list[Image]] | None:
    """A row and its images, or None if the options leave it out."""
    row = rows[index]
    prompt = prompt_of(row)
    if table is None:
        sources, label = _READERS[kind](row)
    else:
        sources = sources_of(row)
        order, label = table.relabel(index, pair_label(row))
        sources = [sources[place] for place in order]
    if label.tie and options.ties != "half":
        sieve.leave_out(index, TIE, option="ties", how=options.ties, fix="drop")
        return None
    opened = [open_picture(rows, row, index, *source) for source in sources]
    pictures = tuple(picture for picture, _ in opened)
    if table is not None:
        table.check(index, [picture.digest for picture in pictures])
    same = len(pictures) > 1 and len({picture.digest for picture in pictures}) == 1
    if same and options.identical_pairs != "keep":
        how = options.identical_pairs
        sieve.leave_out(index, SAME[kind], option="identical_pairs", how=how, fix="skip")
        return None
    return ImageRow(index, prompt, pictures, label), [image for _, image in opened]


def _pair(row: Row) -> tuple[Sequence[Source], Label]:
    label = pair_label(row)
    chosen, rejected, tie = _sides(row)
    if tie:
        # The log-odds of an even preference are 0: both orders count one half.
        label = replace(label, rank=(0, 0), numbers={**label.numbers, "p_chosen": 0.5})
    return [(chosen, None), (rejected, None)], label


def _group(row: Row) -> tuple[Sequence[Source], Label]:
    images = row.get("images")
    if isinstance(images, (str, bytes)) or not isinstance(images, Sequence):
        raise BadRow("no image", f"images is a list; got {type(images).__name__}")
    places, label = group_label(row, len(images))
    return [("images", place) for place in places], label


def _single(row: Row) -> tuple[Sequence[Source], Label]:
    return [("image", None)], single_label(row)


_READERS: Mapping[str, Callable[[Row], tuple[Sequence[Source], Label]]] = {
    "pairs": _pair,
    "groups": _group,
    "unpaired": _single,
}


def _sides(row: Row) -> tuple[str, str, bool]:
    """The columns of the chosen and the rejected image, and whether that is a tie."""
    if "chosen" in row or "rejected" in row or not {"jpg_0", "jpg_1"} & set(row):
        return "chosen", "rejected", False
    label = _side_label(row, "label_0")
    other = _side_label(row, "label_1")
    if label is None and other is None:
        raise BadRow("no label", "Pick-a-Pic rows have label_0 or label_1; got neither")
    if label is None:
        label = 1.0 - (other or 0.0)
    if other is not None and label + other != 1:
        raise BadRow("bad label", f"label_0 and label_1 add up to 1; got {label} and {other}")
    winner, loser = ("jpg_0", "jpg_1") if label >= 0.5 else ("jpg_1", "jpg_0")
    return winner, loser, label == 0.5


def _side_label(row: Row, name: str) -> float | None:
    value = number(row, name)
    if value not in (None, 0.0, 0.5, 1.0):
        raise BadRow("bad label", f"{name} is 0, 0.5 or 1; got {row[name]!r}")
    return value
