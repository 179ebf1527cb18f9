"""Image rows of every kind: ties, margins, identical images, and what to do with bad rows.

Images are decoded in threads, a little ahead of whoever asks for the rows.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL.Image import Image

from alignkit.columns import SAME, TIE, BadRow, Sieve, check_columns
from alignkit.errors import ConfigError, DataError, refuse_unknown
from alignkit.labels import Label, pair_label
from alignkit.options import ImageOptions
from alignkit.rows import Row, Rows, read_rows
from alignkit.splits import in_part
from alignkit_diffusion.layouts import (
    COLUMNS,
    COLUMNS_OF,
    LeftOut,
    Reading,
    prompt_of,
    read_layout,
    sources_of,
)
from alignkit_diffusion.pictures import Picture, open_picture
from alignkit_diffusion.score_labels import ScoreTable
from alignkit_diffusion.streams import Streamed, is_stream

HELD_OUT = "held out by their prompt"
SMALL_MARGIN = "margin below min_margin"

THREADS = max(2, min(8, os.cpu_count() or 1))
AHEAD = 4 * THREADS
"""Rows whose images are decoded before they are asked for."""


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
    if is_stream(data) and options.cache is not None and options.crop != "random":
        rows: Rows = Streamed(data, options.columns)
    else:
        rows = read_rows(data, columns=options.columns)
    if kind is not None:
        check_columns(rows[0], kind, COLUMNS_OF, rows.name)
    return rows


def numbers_of(rows: Rows) -> Iterable[int]:
    """The numbers of all rows."""
    return rows.numbers() if isinstance(rows, Streamed) else range(len(rows))


class _Pending(NamedTuple):
    """A row whose images are being decoded."""

    number: int
    prompt: str
    found: Reading | Exception
    opened: Future[list[tuple[Picture, Image, Any]]] | None


Prepare = Callable[[list[Picture]], Callable[[Picture, Image], Any]]
"""The pictures of a row -> what is made of each of them, in the thread that decoded it."""


def read_examples(
    rows: Rows,
    kind: str,
    options: ImageOptions,
    sieve: Sieve,
    make: Prepare,
    *,
    indices: Iterable[int] | None = None,
    scores: ScoreTable | None = None,
) -> Iterator[tuple[ImageRow, list[Any]]]:
    """The usable rows in their order, each with what `make` made of its images.

    Args:
        rows: from `open_rows`.
        kind: "pairs", "groups", "unpaired" or "supervised".
        options: which part of the data is read, and what is left out.
        sieve: leaves out, and counts.
        make: works on images in threads.
        indices: of the rows; None reads all of them.
        scores: of `score_table`, if it has been read already.

    Raises:
        ConfigError: `min_margin` for rows that are no pairs.
        DataError: a row is bad, a tie, or an identical pair, and the options say "error".
    """
    if options.min_margin is not None and kind != "pairs":
        raise ConfigError(
            f"data_options.min_margin is for pairs; the rows of this method are {kind}. Leave it "
            "out."
        )
    scores = score_table(rows, kind, options) if scores is None else scores
    waiting: deque[_Pending] = deque()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="alignkit-decode") as pool:
        try:
            for index in numbers_of(rows) if indices is None else indices:
                waiting.append(_begin(rows, index, kind, options, scores, make, pool))
                if len(waiting) > AHEAD:
                    yield from _end(waiting.popleft(), kind, options, scores, sieve)
            while waiting:
                yield from _end(waiting.popleft(), kind, options, scores, sieve)
        finally:
            for pending in waiting:
                if pending.opened is not None:
                    pending.opened.cancel()


def _begin(
    rows: Rows,
    index: int,
    kind: str,
    options: ImageOptions,
    scores: ScoreTable | None,
    make: Prepare,
    pool: ThreadPoolExecutor,
) -> _Pending:
    """Read a row, and start to decode its images. What is wrong with it is kept for its turn."""
    prompt = ""
    try:
        row = rows[index]
        prompt = prompt_of(row)
        if not in_part(prompt, options.held_out_share, options.part):
            return _Pending(index, prompt, LeftOut(HELD_OUT), None)
        found = read_layout(row, kind) if scores is None else _by_scores(scores, row, index)
    except (BadRow, LeftOut, DataError) as error:
        return _Pending(index, prompt, error, None)
    if found.label.tie and options.ties != "half":
        return _Pending(index, prompt, found, None)
    opened = pool.submit(_open, rows, row, index, found, make)
    return _Pending(index, prompt, found, opened)


def score_table(rows: Rows, kind: str, options: ImageOptions) -> ScoreTable | None:
    """The scores that decide which image of a pair is chosen, if the options name some."""
    if options.labels is None:
        return None
    if kind != "pairs":
        raise ConfigError(
            "data_options.labels decides which image of a pair is chosen, and this run reads "
            f"{kind}. Take a loss of pairs, or leave labels out."
        )
    return ScoreTable(options.labels, len(rows))


def _by_scores(scores: ScoreTable, row: Row, index: int) -> Reading:
    sources = sources_of(row)
    order, label = scores.relabel(index, pair_label(row))
    return Reading([sources[place] for place in order], label)


def _open(
    rows: Rows, row: Row, index: int, found: Reading, make: Prepare
) -> list[tuple[Picture, Image, Any]]:
    """The images of a row. What is made of them may depend on all their sizes."""
    opened = [open_picture(rows, row, index, *source) for source in found.sources]
    of_each = make([picture for picture, _ in opened])
    return [(picture, image, of_each(picture, image)) for picture, image in opened]


def _end(
    pending: _Pending,
    kind: str,
    options: ImageOptions,
    scores: ScoreTable | None,
    sieve: Sieve,
) -> Iterator[tuple[ImageRow, list[Any]]]:
    """The row, or nothing where the options leave it out."""
    index, prompt, found, opened = pending
    with sieve.guard(index):
        if isinstance(found, LeftOut):
            if not (options.part == "held_out" and str(found) == HELD_OUT):
                sieve.skipped[str(found)] += 1
            return
        if isinstance(found, Exception):
            raise found
        if opened is None:
            sieve.leave_out(index, TIE, option="ties", how=options.ties, fix="drop")
            return
        if options.min_margin is not None and margin_of(found.label) < options.min_margin:
            sieve.skipped[SMALL_MARGIN] += 1
            return
        images = opened.result()
        pictures = tuple(picture for picture, _, _ in images)
        if scores is not None:
            scores.check(index, [picture.digest for picture in pictures])
        same = len(pictures) > 1 and len({picture.digest for picture in pictures}) == 1
        if (same or found.same) and options.identical_pairs != "keep":
            how = options.identical_pairs
            sieve.leave_out(index, SAME[kind], option="identical_pairs", how=how, fix="skip")
            return
        yield ImageRow(index, prompt, pictures, found.label), [made for _, _, made in images]


def margin_of(label: Label) -> float:
    """How much better the chosen image is said to be.

    Raises:
        BadRow: the row does not say.
    """
    if len(label.score) == 2:
        return label.score[0] - label.score[1]
    if "target_margin" in label.numbers:
        return label.numbers["target_margin"]
    raise BadRow(
        "no margin",
        "data_options.min_margin compares score_chosen with score_rejected, or else reads the "
        "column margin; this row has neither",
    )
