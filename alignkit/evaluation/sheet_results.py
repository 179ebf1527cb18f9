"""What filled sheets say: majorities per item, win rates over items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import DataError, nearest
from alignkit.evaluation.sheet import FORMATS, LABELS, QUESTIONS, key_of, rows_of
from alignkit.facts import EvaluationRow
from alignkit.statistics import preference_rate

_MEANINGS = {"a": "a", "b": "b", "tie": "tie", "t": "tie", "=": "tie"}


@dataclass(frozen=True)
class SheetResult:
    """What the raters say.

    Attributes:
        measures: question -> the win rate over items of the side that was evaluated, by majority.
        majorities: question -> item -> "model", "opponent" or "tie".
        labels: question -> number of labels.
        short: items with fewer labels than the protocol wants, on some question.
    """

    measures: Mapping[str, EvaluationRow]
    majorities: Mapping[str, Mapping[int, str]]
    labels: Mapping[str, int]
    short: int

    def __str__(self) -> str:
        return "\n".join(f"{row.measure}: {row}" for row in self.measures.values())


def read_sheets(
    folder: str | Path,
    filled: Sequence[str | Path] | None = None,
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> SheetResult:
    """Majorities and win rates of filled sheets.

    Of an item's labels the most frequent of A, B and tie counts; where A and B are level, or
    neither has more than the ties, it is a tie. An empty field is no label.

    Args:
        folder: of `write_sheet`.
        filled: files, a rater or several in each; None reads all .csv and .jsonl of the folder that
            hold a label.
        confidence, num_resamples, seed: of the bootstrap over items.

    Raises:
        DataError: a label or item is unknown, or a rater answered an item twice.
        ConfigError: there is no sheet.
    """
    folder = Path(folder)
    key = key_of(folder)
    questions = QUESTIONS[key["modality"]]
    paths = sorted(p for p in folder.iterdir() if p.suffix in FORMATS) if filled is None else filled
    votes: dict[str, dict[int, dict[str, str]]] = {question: {} for question in questions}
    for path in paths:
        for number, row in enumerate(rows_of(Path(path))):
            _count(row, f"{path}, row {number} (counted from 0)", str(path), key, votes)
    labels = {q: sum(map(len, items.values())) for q, items in votes.items()}
    if not any(labels.values()):
        raise DataError(
            f"The sheets of {folder} hold no label. Write a, b or tie into the columns "
            f"{', '.join(questions)}, and a name into rater."
        )
    majorities = {
        question: {item: _majority(said, key["model_is"][item]) for item, said in items.items()}
        for question, items in votes.items()
        if items
    }
    worth = {"model": 1.0, "tie": 0.5, "opponent": 0.0}
    how = {"confidence": confidence, "num_resamples": num_resamples, "seed": seed}
    measures = {
        question: EvaluationRow.of(
            f"win rate by majority: {questions[question]}",
            preference_rate([worth[one] for one in items.values()], **how),  # type: ignore[arg-type]
        )
        for question, items in majorities.items()
    }
    lacking = {
        item
        for item in range(len(key["model_is"]))
        if any(len(votes[q].get(item, {})) < LABELS for q in questions)
    }
    return SheetResult(measures, majorities, labels, len(lacking))


def _count(
    row: Mapping[str, Any],
    where: str,
    file: str,
    key: Mapping[str, Any],
    votes: dict[str, dict[int, dict[str, str]]],
) -> None:
    """Add a row's labels to the votes."""
    given = {q: str(row.get(q) or "").strip().casefold() for q in votes}
    if not any(given.values()):
        return
    try:
        item = int(row["item"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}: item is the number of an item; got {row.get('item')!r}."
        ) from error
    if not 0 <= item < len(key["model_is"]):
        raise DataError(f"{where}: the sheet has no item {item}; it has {len(key['model_is'])}.")
    rater = str(row.get("rater") or "").strip() or file
    for question, label in given.items():
        if not label:
            continue
        if label not in _MEANINGS:
            raise DataError(
                f"{where}: a label is a, b or tie; {question} says {label!r}."
                f"{nearest(label, _MEANINGS)}"
            )
        said = votes[question].setdefault(item, {})
        if rater in said:
            raise DataError(
                f"{where}: {rater} answered item {item} ({question}) twice. Give every rater a "
                "name of their own, and one row per item."
            )
        said[rater] = _MEANINGS[label]


def _majority(said: Mapping[str, str], model_is: str) -> str:
    counts = {label: list(said.values()).count(label) for label in ("a", "b", "tie")}
    if counts["a"] == counts["b"] or counts["tie"] > max(counts["a"], counts["b"]):
        return "tie"
    winner = "a" if counts["a"] > counts["b"] else "b"
    return "model" if winner == model_is else "opponent"
