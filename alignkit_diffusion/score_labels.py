"""Preferences by scores that stand beside the data (see `labelling`), in the place of people's.

    hard   the image of the higher score is chosen; equal scores are a tie
    soft   besides, P(a beats b) = sigmoid((score_a - score_b) / temperature)      Bradley-Terry

The AI feedback variant of Wallace et al. 2023 (2311.12908), section 5.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignkit.columns import BadRow
from alignkit.errors import ConfigError, DataError, nearest
from alignkit.labels import Label
from alignkit.options import ScoreLabels
from alignkit.records import from_json

FACTS = "scores.json"
PART = 256
"""Rows of a part: what a kill can cost, and what is scored in one call."""


def part_name(start: int) -> str:
    """The file of the rows from `start` on."""
    return f"part-{start // PART:06d}.parquet"


class ScoreTable:
    """The scores of a folder, for the rows of one data set.

    Args:
        options: the folder, and whose scores count.
        num_rows: of the data that is read.

    Raises:
        ConfigError: there is no such folder or no such scorer in it.
        DataError: it holds the scores of other data, or not yet all of them.
    """

    def __init__(self, options: ScoreLabels, num_rows: int) -> None:
        folder = Path(options.folder).expanduser()
        if not (folder / FACTS).is_file():
            raise ConfigError(
                f"data_options.labels.folder must hold scores; there is no {folder / FACTS}. Make "
                "them with: alignkit label images DATA --scorer NAME --out FOLDER."
            )
        facts = from_json((folder / FACTS).read_bytes()) or {}
        self.weights = _weights(options.scorer, facts.get("scorers") or {}, folder)
        if facts.get("rows") != num_rows:
            raise DataError(
                f"{folder} holds the scores of {facts.get('rows')} rows, and the data has "
                f"{num_rows}: they do not belong together. Score this data."
            )
        self.folder = folder
        self.options = options
        self._table = _read(folder, num_rows, list(self.weights))

    def relabel(self, row: int, label: Label) -> tuple[list[int], Label]:
        """The order of a pair's images, chosen first, and its label by the scores.

        Args:
            row: its number.
            label: what the data says; its weight stays, its margin and p_chosen do not.

        Returns:
            Places in the order of the data's columns, and the label.

        Raises:
            BadRow: an image has no score.
        """
        found = self._scores(row)
        if not found["digests"]:
            raise BadRow("no score", "its images could not be scored")
        scores = [self._combined(found, place) for place in range(2)]
        order = [0, 1] if scores[0] >= scores[1] else [1, 0]
        gap = abs(scores[0] - scores[1])
        numbers = {name: value for name, value in label.numbers.items() if name == "weight"}
        if self.options.soft:
            numbers["p_chosen"] = 1 / (1 + math.exp(-gap / self.options.temperature))
        elif gap == 0:
            numbers["p_chosen"] = 0.5
        rank = (0, 0) if gap == 0 else (0, 1)
        chosen, rejected = (scores[place] for place in order)
        return order, replace(label, rank=rank, score=(chosen, rejected), numbers=numbers)

    def check(self, row: int, digests: Sequence[str]) -> None:
        """Refuse other images than those that were scored.

        Raises:
            DataError: an image of the row has another digest.
        """
        if sorted(self._scores(row)["digests"]) != sorted(digests):
            raise DataError(
                f"Row {row} (counted from 0): its images are not those that were scored in "
                f"{self.folder}. Score the data again, into another folder."
            )

    def _scores(self, row: int) -> dict[str, Any]:
        found: dict[str, Any] = self._table.slice(row, 1).to_pylist()[0]
        return found

    def _combined(self, found: dict[str, Any], place: int) -> float:
        parts = [(found[name][place], weight) for name, weight in self.weights.items()]
        if any(score is None for score, _ in parts):
            raise BadRow("no score", "a scorer had no score for one of its images")
        return sum(score * weight for score, weight in parts)


def _weights(scorer: Any, known: Any, folder: Path) -> dict[str, float]:
    weights = {scorer: 1.0} if isinstance(scorer, str) else dict(scorer)
    for name in weights:
        if name not in known:
            raise ConfigError(
                f"data_options.labels.scorer must be among the scorers of {folder}, "
                f"{', '.join(known)}; got {name!r}.{nearest(name, known)}"
            )
    return weights


def _read(folder: Path, num_rows: int, names: list[str]) -> Any:
    import pyarrow
    import pyarrow.parquet

    parts = [folder / part_name(start) for start in range(0, num_rows, PART)]
    missing = [path.name for path in parts if not path.is_file()]
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing)} of {len(parts)} parts, such as {missing[0]}: scoring "
            "was not finished. Run the same alignkit label images again; it goes on where it was."
        )
    try:
        tables = [pyarrow.parquet.read_table(path, columns=["digests", *names]) for path in parts]
        return pyarrow.concat_tables(tables)
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise DataError(
            f"{folder} holds a part that cannot be read: {error}. Delete it and score again."
        ) from error
