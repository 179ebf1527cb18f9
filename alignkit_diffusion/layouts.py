"""How image preferences are written: one small function and one table row per layout.

A layout is told by its columns, row by row. `data_options.columns` renames other people's columns
to these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from alignkit.columns import BadRow, Column, number
from alignkit.labels import (
    Label,
    demonstration_label,
    group_label,
    pair_label,
    single_label,
)
from alignkit.rows import Row

Source = tuple[str, int | None]
"""A column, and the place in it if it holds a list."""

IMAGE_COLUMNS = (
    *(("chosen", "rejected"), ("jpg_0", "jpg_1"), ("path1", "path2")),
    *(("images",), ("image_path",), ("image",)),
)
"""The sets of columns that hold images; the first that a row has all of counts."""

PROMPT = ("prompt", "caption")
OPTIONAL = (
    *("weight", "margin", "p_chosen", "score_chosen", "score_rejected"),
    *("has_label", "are_different"),
)


class LeftOut(Exception):
    """A row that its data marks as not to be used; counted, never an error."""


class Reading(NamedTuple):
    """What a layout finds in a row.

    Attributes:
        sources: where its images are; of a pair, the chosen one first.
        label: what the row says of them.
        same: the row says that its images are one and the same.
    """

    sources: Sequence[Source]
    label: Label
    same: bool = False


def _chosen_rejected(row: Row) -> Reading:
    """Ours, and that of open-image-preferences and most binarized sets."""
    return Reading([("chosen", None), ("rejected", None)], pair_label(row))


def _pick_a_pic(row: Row) -> Reading:
    """Pick-a-Pic v1 and v2 (2305.01569): label_0 is 1 where jpg_0 won, 0 where jpg_1 did, 0.5 for
    a tie."""
    if _flag(row, "has_label") is False:
        raise LeftOut("no label (has_label is false)")
    first, second = _side(row, "label_0"), _side(row, "label_1")
    if first is None and second is None:
        raise BadRow("no label", "Pick-a-Pic rows have label_0 or label_1; got neither")
    if first is None:
        first = 1.0 - (second or 0.0)
    if second is not None and first + second != 1:
        raise BadRow("bad label", f"label_0 and label_1 add up to 1; got {first} and {second}")
    reading = _of_two(row, "jpg_0", "jpg_1", first - 0.5)
    return reading._replace(same=_flag(row, "are_different") is False)


def _hpd_pair(row: Row) -> Reading:
    """HPD v2 (2306.09341): two paths, and a 1 for the preferred one. Two equal numbers tie."""
    images = _images(row, "image_path")
    if len(images) != 2:
        raise BadRow("not a pair", f"a pair has two images; image_path has {len(images)}")
    first, second = _numbers(row, "human_preference", 2)
    return _of_two(row, ("image_path", 0), ("image_path", 1), first - second)


def _hpd3_pair(row: Row) -> Reading:
    """HPD v3 (2508.03789): path1 is the preferred image."""
    return Reading([("path1", None), ("path2", None)], pair_label(row))


def _images_ranked(row: Row) -> Reading:
    """Ours: K images with a ranking, 0 for the best, or with scores."""
    places, label = group_label(row, len(_images(row, "images")))
    return Reading([("images", place) for place in places], label)


def _hpd_group(row: Row) -> Reading:
    """HPD v2's lists: by `rank`, the smallest number for the best, or by human_preference."""
    count = len(_images(row, "image_path"))
    if "rank" in row:
        ranks = _numbers(row, "rank", count)
        told: Row = {"ranking": [rank - min(ranks) for rank in ranks]}
    else:
        told = {"scores": _numbers(row, "human_preference", count)}
    places, label = group_label({**row, **told}, count)
    return Reading([("image_path", place) for place in places], label)


def _single(row: Row) -> Reading:
    """Ours: one image and whether it is liked."""
    return Reading([("image", None)], single_label(row))


def _only(row: Row) -> Reading:
    """Ours: one image to learn."""
    return Reading([("image", None)], demonstration_label(row))


def _chosen_of(read: Callable[[Row], Reading]) -> Callable[[Row], Reading]:
    """The chosen image of a pair, to learn; a tie has none, and is left out as one."""

    def chosen(row: Row) -> Reading:
        reading = read(row)
        if reading.label.tie:
            return reading
        return Reading(reading.sources[:1], demonstration_label(row))

    return chosen


@dataclass(frozen=True)
class Layout:
    """One way to write one kind of rows.

    Attributes:
        columns: what a row of it has.
        read: finds images and label in such a row; raises `BadRow` or `LeftOut`.
    """

    columns: tuple[Column, ...]
    read: Callable[[Row], Reading]


_PAIRS = (
    Layout((PROMPT, "chosen", "rejected"), _chosen_rejected),
    Layout((PROMPT, "jpg_0", "jpg_1", ("label_0", "label_1")), _pick_a_pic),
    Layout((PROMPT, "image_path", "human_preference"), _hpd_pair),
    Layout((PROMPT, "path1", "path2"), _hpd3_pair),
)

LAYOUTS: Mapping[str, tuple[Layout, ...]] = {
    "pairs": _PAIRS,
    "groups": (
        Layout((PROMPT, "images", ("ranking", "scores")), _images_ranked),
        Layout((PROMPT, "image_path", ("rank", "human_preference")), _hpd_group),
    ),
    "unpaired": (Layout((PROMPT, "image", "label"), _single),),
    "supervised": (
        Layout((PROMPT, "image"), _only),
        *(Layout(pair.columns, _chosen_of(pair.read)) for pair in _PAIRS),
    ),
}
"""Kind of rows -> the ways to write them."""

COLUMNS_OF = {kind: tuple(found.columns for found in LAYOUTS[kind]) for kind in LAYOUTS}
"""Kind -> the columns of each of its layouts."""

COLUMNS = {
    *OPTIONAL,
    *(
        name
        for layouts in COLUMNS_OF.values()
        for layout in layouts
        for column in layout
        for name in ([column] if isinstance(column, str) else column)
    ),
}
"""What may be renamed."""


def read_layout(row: Row, kind: str) -> Reading:
    """By the layout of which the row lacks the fewest columns, the first of equals.

    Raises:
        BadRow: the row cannot be used.
        LeftOut: its data says that it is not to be used.
    """
    return min(LAYOUTS[kind], key=lambda layout: lacking(row, layout)).read(row)


def lacking(row: Row, layout: Layout) -> int:
    """How many columns of a layout a row lacks."""
    wanted = [(c,) if isinstance(c, str) else c for c in layout.columns]
    return sum(not any(name in row for name in names) for names in wanted)


def sources_of(row: Row) -> list[Source]:
    """Where the images of a row are, of any kind, in the order of its columns.

    Raises:
        BadRow: there are none.
    """
    for names in IMAGE_COLUMNS:
        if all(name in row for name in names):
            return [(name, place) for name in names for place in _places(row[name])]
    told = ", or ".join(" and ".join(names) for names in IMAGE_COLUMNS)
    raise BadRow("no image", f"images stand in {told}; columns found: {', '.join(row)}")


def _places(value: Any) -> Sequence[int | None]:
    return range(len(value)) if isinstance(value, list | tuple) else [None]


def prompt_of(row: Row) -> str:
    """The prompt of a row; the empty string is one.

    Raises:
        BadRow: there is none, or it is not a string.
    """
    prompt = row.get("prompt", row.get("caption"))
    if not isinstance(prompt, str):
        raise BadRow("no prompt", f"a prompt is a string; got {type(prompt).__name__}")
    return prompt


def _of_two(row: Row, first: str | Source, second: str | Source, preference: float) -> Reading:
    """A pair in the order of the preference for `first`; 0 is a tie."""
    sources = [(s, None) if isinstance(s, str) else s for s in (first, second)]
    label = pair_label(row)
    if preference == 0:
        # The log-odds of an even preference are 0: both orders count one half.
        label = replace(label, rank=(0, 0), numbers={**label.numbers, "p_chosen": 0.5})
    return Reading(sources if preference >= 0 else sources[::-1], label)


def _side(row: Row, name: str) -> float | None:
    value = number(row, name)
    if value not in (None, 0.0, 0.5, 1.0):
        raise BadRow("bad label", f"{name} is 0, 0.5 or 1; got {row[name]!r}")
    return value


def _flag(row: Row, name: str) -> bool | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    found = {"true": True, "1": True, "false": False, "0": False}.get(str(value).strip().lower())
    if found is None:
        raise BadRow(f"bad {name}", f"{name} is true or false; got {value!r}")
    return found


def _images(row: Row, name: str) -> Sequence[Any]:
    images = row.get(name)
    if isinstance(images, (str, bytes)) or not isinstance(images, Sequence):
        raise BadRow("no image", f"{name} is a list; got {type(images).__name__}")
    return images


def _numbers(row: Row, name: str, count: int) -> list[float]:
    values = row.get(name)
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise BadRow(f"bad {name}", f"{name} is a list of numbers; got {type(values).__name__}")
    found = [value for one in values if (value := number({name: one}, name)) is not None]
    if len(found) != count or len(values) != count:
        raise BadRow(f"bad {name}", f"{name} has one number per image, {count}; got {values!r}")
    return found
