"""Scores of images beside the rows: data is scored once, and training chooses what to believe.

A folder of scores holds `scores.json`, which says of what and by whom, and parts of a fixed number
of rows, `part-000000.parquet` and on. A part is written whole or not at all; called again, what is
there is kept.

    row (int)   digests (list of strings)   one list of numbers for each scorer
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image
from tqdm.auto import tqdm

from alignkit.atomic import atomic_write
from alignkit.columns import BadRow
from alignkit.errors import ConfigError, DataError
from alignkit.protocols import Reward
from alignkit.records import keep_or_refuse
from alignkit.rows import Row, Rows, read_rows
from alignkit.scoring import Score, scores_of
from alignkit_diffusion.layouts import prompt_of, sources_of
from alignkit_diffusion.pictures import Picture, open_picture
from alignkit_diffusion.score_labels import FACTS, PART, part_name

log = logging.getLogger("alignkit")


def score_images(
    data: Any,
    scorers: Mapping[str, Reward],
    out: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    made_by: Mapping[str, str] | None = None,
) -> Path:
    """Score every image of every row for its prompt, and write the scores beside the data.

    A broken image has no score, and a row of one is counted; nothing becomes 0.

    Args:
        data: image rows of any kind, as `align` takes them; ties are scored, too.
        scorers: name -> `(prompts, images, rows) -> scores`.
        out: the folder of scores. If it holds some already, scoring goes on where it was.
        columns: our column name -> the data's.
        made_by: of each scorer, what its scores rest on, such as its weights; kept, and compared
            when scoring goes on.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder holds scores of other data or by other scorers.
        DataError: a scorer gave something else than one number, or None, for each image.
    """
    if not scorers:
        raise ConfigError("Scores are made by at least one scorer; got none.")
    for name in scorers:
        if name in ("row", "digests") or not name.isidentifier():
            raise ConfigError(
                f"A scorer's name is the name of a column, such as clip; got {name!r}."
            )
    rows, folder = read_rows(data, columns=columns or {}), Path(out)
    facts = {"rows": len(rows), "scorers": {n: (made_by or {}).get(n, n) for n in scorers}}
    keep_or_refuse(folder / FACTS, facts, "scores")
    broken: Counter[str] = Counter()
    for start in tqdm(range(0, len(rows), PART), desc="Scoring rows", disable=None):
        path = folder / part_name(start)
        if not path.exists():
            numbers = range(start, min(start + PART, len(rows)))
            atomic_write(path, _part(rows, numbers, scorers, broken))
    if broken:
        told = ", ".join(f"{count} {reason}" for reason, count in broken.items())
        log.warning("%s: without scores: %s.", rows.name, told)
    return folder


def _part(rows: Rows, numbers: range, scorers: Mapping[str, Reward], broken: Counter[str]) -> bytes:
    """A part as the bytes of its file."""
    import pyarrow
    import pyarrow.parquet

    found = [_images(rows, number, broken) for number in numbers]
    asked = [
        (rows[n], image) for n, given in zip(numbers, found, strict=True) for _, image in given
    ]
    digests = [[picture.digest for picture, _ in given] for given in found]
    table: dict[str, Any] = {"row": list(numbers), "digests": digests}
    for name, scorer in scorers.items():
        scores = iter(_ask(name, scorer, asked))
        table[name] = [[next(scores) for _ in given] for given in found]
    numbers_list = pyarrow.list_(pyarrow.float64())
    schema = {"row": pyarrow.int64(), "digests": pyarrow.list_(pyarrow.string())}
    types = pyarrow.schema({**schema, **dict.fromkeys(scorers, numbers_list)})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(table, schema=types), sink)
    return sink.getvalue().to_pybytes()


def _images(rows: Rows, number: int, broken: Counter[str]) -> list[tuple[Picture, Image]]:
    """The images of a row in the order of its columns; none if one of them is broken."""
    row = rows[number]
    try:
        prompt_of(row)
        return [open_picture(rows, row, number, *source) for source in sources_of(row)]
    except BadRow as bad:
        broken[bad.reason] += 1
        return []


def _ask(name: str, scorer: Reward, asked: Sequence[tuple[Row, Image]]) -> list[Score]:
    if not asked:
        return []
    rows = [row for row, _ in asked]
    prompts, images = [prompt_of(row) for row in rows], [image for _, image in asked]
    found = scores_of(scorer, name, prompts, images, rows)
    if len(found) > 1:
        raise DataError(
            f"A scorer returns one number per image; {name!r} returned the parts "
            f"{', '.join(part for part in found if part)}. Give each as a scorer of its own."
        )
    return found[""]
