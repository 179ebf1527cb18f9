"""The state of a set of image rows: sizes, ties, broken images, duplicates, labels, and a look."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from alignkit.columns import SAME, TIE, Sieve, check_kind
from alignkit.data_report import DataReport, Finding, Gallery, Histogram, Table
from alignkit.data_report import Picture as Shown
from alignkit.errors import DataError
from alignkit.options import ImageOptions
from alignkit.rows import Rows
from alignkit.splits import is_held_out, normalised
from alignkit_diffusion.contact_sheet import contacts, thumbnail
from alignkit_diffusion.geometry import Geometry
from alignkit_diffusion.layouts import LAYOUTS, lacking
from alignkit_diffusion.rows import HELD_OUT, ImageRow, open_rows, read_examples

SHOWN = 12
"""Rows of the contact sheet, spread over the data."""

NAMED = 8
"""Rows that a finding names before it only counts."""

NATIVE = 1024


@dataclass
class _Seen:
    """What a pass over the rows has counted; images by their content."""

    rows: list[int] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    shapes: Counter[tuple[int, int]] = field(default_factory=Counter)
    uses: Counter[str] = field(default_factory=Counter)
    prompts: Counter[str] = field(default_factory=Counter)
    pairs: dict[tuple[str, tuple[str, ...]], list[int]] = field(default_factory=dict)
    first: Counter[str] = field(default_factory=Counter)
    desirable: Counter[bool] = field(default_factory=Counter)
    small: int = 0
    aspects: list[float] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    sheet: list[tuple[str, list[Shown]]] = field(default_factory=list)


def examine(data: Any, options: ImageOptions, *, kind: str, tokenizer: str | None) -> DataReport:
    """See `alignkit.doctor`; every image is decoded."""
    assert tokenizer is None
    resolution = options.resolution or NATIVE
    # Bad rows are findings here, and ties and the like are counted.
    lenient = replace(options, resolution=resolution, on_bad_row="skip", cache=None)
    lenient = replace(lenient, ties=_lenient(options.ties, "drop"))
    lenient = replace(lenient, identical_pairs=_lenient(options.identical_pairs, "skip"))
    opened = open_rows(data, lenient)
    kind = _kind_of(opened) if kind == "auto" else kind
    check_kind(kind)
    sieve, seen = Sieve(opened, "skip"), _Seen()
    show = set(range(0, len(opened), max(1, len(opened) // SHOWN)))
    geometry = Geometry(lenient)
    every = replace(lenient, part="all")
    for row, thumbnails in read_examples(opened, kind, every, sieve, lambda _: thumbnail):
        _count(row, thumbnails, seen, geometry, resolution, row.number in show)
    return DataReport(
        name=opened.name,
        modality="image",
        kind={"groups": "rankings of K images", "unpaired": "single images"}.get(kind, kind),
        facts=_facts(opened, seen, options),
        findings=list(_findings(opened, seen, sieve, options, resolution)),
        tables=list(_tables(seen, sieve, options)),
        histograms=[
            Histogram("Aspect of images", {"width / height": seen.aspects}, "ratio", {"square": 1}),
            Histogram(
                "Size of images",
                {"square root of the area": seen.areas},
                "pixels",
                {"resolution": resolution},
            ),
        ],
        galleries=[Gallery("A look at the rows", seen.sheet[:SHOWN])],
    )


def _lenient(how: Any, otherwise: str) -> Any:
    return otherwise if how == "error" else how


def _kind_of(rows: Rows) -> str:
    """By the columns of the first row."""
    for kind, layouts in LAYOUTS.items():
        if any(lacking(rows[0], layout) == 0 for layout in layouts):
            return kind
    found = ", ".join(sorted(map(str, rows[0])))
    raise DataError(
        f"{rows.name} has no columns of image rows; found: {found}. See docs/data-formats.md, or "
        "rename columns with data_options.columns."
    )


def _count(
    row: ImageRow,
    thumbnails: Sequence[bytes],
    seen: _Seen,
    geometry: Geometry,
    resolution: int,
    show: bool,
) -> None:
    digests = tuple(picture.digest for picture in row.pictures)
    seen.rows.append(row.number)
    seen.prompts[normalised(row.prompt)] += 1
    seen.pairs.setdefault((normalised(row.prompt), digests), []).append(row.number)
    seen.first[row.pictures[0].column] += 1
    if row.label.desirable is not None:
        seen.desirable[row.label.desirable] += 1
    placed = geometry.placements(row.pictures, geometry.augmentation(0, 0, row.number))
    seen.shapes[placed[0].target] += 1
    for picture in row.pictures:
        if not seen.uses[picture.digest]:
            seen.sizes[picture.height, picture.width] += 1
            seen.small += min(picture.height, picture.width) < resolution
            seen.aspects.append(picture.width / picture.height)
            seen.areas.append((picture.width * picture.height) ** 0.5)
        seen.uses[picture.digest] += 1
    if show:
        seen.sheet.append(contacts(row, thumbnails))


def _facts(rows: Rows, seen: _Seen, options: ImageOptions) -> dict[str, Any]:
    found: dict[str, Any] = {
        "rows": len(rows),
        "usable rows": len(seen.rows),
        "distinct images": len(seen.uses),
        "uses of an image": _mean(seen.uses.values()),
        "distinct prompts": len(seen.prompts),
        "rows of a prompt": _mean(seen.prompts.values()),
        "sizes": len(seen.sizes),
    }
    if options.held_out_share:
        held = [p for p in seen.prompts if is_held_out(p, options.held_out_share)]
        found["held-out prompts"] = len(held)
        found["held-out rows"] = sum(seen.prompts[prompt] for prompt in held)
    return found


def _mean(values: Iterable[int]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def _tables(seen: _Seen, sieve: Sieve, options: ImageOptions) -> Iterable[Table]:
    if sieve.skipped:
        reasons = [(why, count) for why, count in sieve.skipped.most_common() if why != HELD_OUT]
        yield Table("Rows that a run leaves out, or refuses", ("reason", "rows"), reasons)
    sizes = [(f"{width} x {height}", n) for (height, width), n in seen.sizes.most_common(12)]
    more = len(seen.sizes) - len(sizes)
    told = f"And {more} sizes more." if more else ""
    yield Table("Sizes, width x height", ("size", "images"), sizes, told)
    shapes = [(f"{width} x {height}", n) for (height, width), n in seen.shapes.most_common(12)]
    note = "" if options.buckets else "One square; data_options.buckets takes the nearest shape."
    yield Table("Shapes that rows take", ("shape", "rows"), shapes, note)
    if len(seen.first) > 1:
        firsts = list(seen.first.most_common())
        yield Table("Which column holds the better image", ("column", "rows"), firsts)
    prompts = [(prompt, n) for prompt, n in seen.prompts.most_common(6) if n > 1]
    if prompts:
        yield Table("Prompts with most rows", ("prompt", "rows"), prompts)


def _findings(
    rows: Rows, seen: _Seen, sieve: Sieve, options: ImageOptions, resolution: int
) -> Iterable[Finding]:
    total, usable = len(rows), len(seen.rows)
    if not usable:
        yield Finding("warning", "No row can be used; see what they are left out for.")
        return
    ties = sieve.skipped.get(TIE, 0)
    if ties:
        yield Finding(
            "note",
            f"{ties} of {total} rows ({ties / total:.1%}) are ties. ties='drop' leaves them out, "
            "ties='half' keeps them with p_chosen one half.",
        )
    same = sum(sieve.skipped.get(why, 0) for why in SAME.values())
    if same:
        yield Finding(
            "note",
            f"{same} of {total} rows have nothing but the same image, and teach nothing. "
            "identical_pairs='skip' leaves them out.",
        )
    yield from _bad(sieve, options)
    yield from _duplicates(seen)
    yield from _balance(seen, usable)
    if seen.small:
        yield Finding(
            "warning" if seen.small > len(seen.uses) / 4 else "note",
            f"{seen.small} of {len(seen.uses)} images are smaller than {resolution} pixels on a "
            "side, and are enlarged. A model learns the blur of enlarged images: train at a lower "
            "resolution, or leave them out.",
        )
    far = sum(not 0.8 <= aspect <= 1.25 for aspect in seen.aspects)
    if far > len(seen.aspects) / 10 and not options.buckets:
        yield Finding(
            "note",
            f"{far} of {len(seen.aspects)} images are far from square, and lose a fifth or more of "
            "their long side. data_options.buckets=True keeps their shape.",
        )
    empty = seen.prompts.get("", 0)
    if empty:
        yield Finding("note", f"{empty} rows have an empty prompt.")


_EXPECTED = (TIE, HELD_OUT, *SAME.values())


def _bad(sieve: Sieve, options: ImageOptions) -> Iterable[Finding]:
    found = {why: n for why, n in sieve.skipped.items() if why not in _EXPECTED}
    if not found:
        yield Finding("good", "Every image can be decoded, and every label read.")
        return
    told = ", ".join(f"{n} {why}" for why, n in found.items())
    how = "refuses the first bad one" if options.on_bad_row == "error" else "leaves them out"
    yield Finding(
        "warning",
        f"Rows that cannot be used: {told}. A run {how} (on_bad_row={options.on_bad_row!r}).",
    )


def _duplicates(seen: _Seen) -> Iterable[Finding]:
    again = [numbers for numbers in seen.pairs.values() if len(numbers) > 1]
    swapped = [
        (numbers[0], seen.pairs[prompt, digests[::-1]][0])
        for (prompt, digests), numbers in seen.pairs.items()
        if len(digests) == 2 and digests[0] < digests[1] and (prompt, digests[::-1]) in seen.pairs
    ]
    if again:
        extra = sum(len(numbers) - 1 for numbers in again)
        yield Finding(
            "note",
            f"{extra} rows repeat another one, images and prompt alike, such as rows "
            f"{_some(n for numbers in again for n in numbers)}.",
        )
    if swapped:
        yield Finding(
            "warning",
            f"{len(swapped)} pairs are there both ways round, each image chosen once, such as rows "
            f"{_some(n for both in swapped for n in both)}: their labels contradict each other.",
        )
    if not (again or swapped):
        yield Finding("good", "No row is there twice, and no pair both ways round.")


def _balance(seen: _Seen, usable: int) -> Iterable[Finding]:
    if len(seen.first) == 2 and "chosen" not in seen.first:
        column, most = seen.first.most_common(1)[0]
        if most > 0.6 * usable:
            yield Finding(
                "warning",
                f"{column} holds the better image in {most / usable:.0%} of rows. Where the sides "
                "were shown at random, about half is expected.",
            )
    if seen.desirable:
        good = seen.desirable[True]
        yield Finding(
            "note",
            f"{good} of {usable} images are liked. KTO's weights of the two sides should make up "
            "for an imbalance (2402.01306, sec. 4.2).",
        )


def _some(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    return ", ".join(map(str, found[:NAMED])) + (" ..." if len(found) > NAMED else "")
