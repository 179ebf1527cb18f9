"""What a row says of its answers, in both wings: their order, scores, label and numbers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from alignkit.batches import Batch
from alignkit.columns import BadRow, number

NUMBERS = {
    "pairs": ("weight", "margin", "p_chosen"),
    "groups": ("weight",),
    "unpaired": ("weight",),
    "supervised": ("weight",),
    "rated": ("weight",),
}
"""Kind -> its optional numeric columns."""

_ROWS = {
    "groups": "rankings",
    "unpaired": "single answers",
    "supervised": "demonstrations",
    "rated": "rated answers",
}

_FIELDS = {"weight": "weight", "margin": "target_margin", "p_chosen": "p_chosen"}
_NEUTRAL = {"weight": 1.0, "target_margin": 0.0, "p_chosen": 1.0}
_LABELS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True)
class Label:
    """What one row says of its answers, in their order.

    Attributes:
        rank: 0 for the best, equal for a tie, -1 for none.
        score: one number per answer, or empty.
        desirable: the label of a single answer.
        numbers: the optional numbers, by the batch's names for them.
    """

    rank: tuple[int, ...]
    score: tuple[float, ...] = ()
    desirable: bool | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def tie(self) -> bool:
        """Whether no answer is preferred to another."""
        return self.desirable is None and len(self.rank) > 1 and len(set(self.rank)) == 1


def pair_label(row: Mapping[str, Any]) -> Label:
    """Of a pair, chosen first; `score_chosen` and `score_rejected` come together or not at all."""
    given = {name: number(row, name) for name in ("score_chosen", "score_rejected")}
    score = tuple(value for value in given.values() if value is not None)
    if len(score) == 1:
        (name,) = (name for name, value in given.items() if value is None)
        raise BadRow(
            "one score of two", f"the answers of a pair are both scored; {name} is missing"
        )
    return Label((0, 1), score, numbers=_numbers(row, "pairs"))


def group_label(row: Mapping[str, Any], count: int) -> tuple[list[int], Label]:
    """Of `count` answers to one prompt, by `ranking` or, if there is none, by `scores`.

    Answers without a score are left out: what has not been judged is not worse.

    Returns:
        The places of the answers that are used, and their label.
    """
    scores = _list(row, "scores", count)
    values = None if scores is None else [number({"score": one}, "score") for one in scores]
    given = _list(row, "ranking", count)
    if given is not None:
        places = list(range(count))
        rank = [_rank(value) for value in given]
        if min((r for r in rank if r >= 0), default=-1) != 0:
            raise BadRow("bad ranking", f"the best answer of a ranking has rank 0; got {given}")
    elif values is not None:
        found = {place: value for place, value in enumerate(values) if value is not None}
        places = list(found)
        rank = [sum(other > value for other in found.values()) for value in found.values()]
    else:
        raise BadRow("no ranking", "answers are ordered by ranking or scores; got neither")
    if len(places) < 2:
        raise BadRow("fewer than two answers", "a ranking compares at least two answers")
    # Dense, so that the losses may count in places.
    order = {r: new for new, r in enumerate(sorted({r for r in rank if r >= 0}))}
    label = Label(
        tuple(order.get(r, -1) for r in rank),
        () if values is None else tuple(_or_nan(values[place]) for place in places),
        numbers=_numbers(row, "groups"),
    )
    return places, label


def single_label(row: Mapping[str, Any]) -> Label:
    """Of one answer: `label`, a bool, or 0, 1, "true" or "false" as csv files hold it."""
    value = row.get("label")
    desirable = _LABELS.get(str(value).strip().lower())
    if desirable is None and isinstance(value, float) and value in (0.0, 1.0):
        desirable = bool(value)
    if desirable is None:
        raise BadRow("bad label", f"label is true or false, or 1 or 0; got {value!r}")
    return Label((-1,), desirable=desirable, numbers=_numbers(row, "unpaired"))


def rated_label(row: Mapping[str, Any]) -> Label:
    """Of one answer: `score`, a number."""
    score = number(row, "score")
    if score is None:
        raise BadRow("no score", f"a rated answer has a score; got {row.get('score')!r}")
    return Label((-1,), (score,), numbers=_numbers(row, "rated"))


def demonstration_label(row: Mapping[str, Any]) -> Label:
    """Of an answer to learn, which is the best there is."""
    return Label((0,), numbers=_numbers(row, "supervised"))


def weight_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The weight of a row of any kind, by the batch's names; nothing where it gives none."""
    weight = number(row, "weight")
    return {} if weight is None else {"weight": weight}


def _numbers(row: Mapping[str, Any], kind: str) -> dict[str, float]:
    for name in NUMBERS["pairs"]:
        if name not in NUMBERS[kind] and row.get(name) not in (None, ""):
            raise BadRow(
                f"{name} beside {_ROWS[kind]}",
                f"the column {name!r} speaks of a pair, and rows are {_ROWS[kind]}; leave it out, "
                "or give pairs and a loss of PREFERENCE_LOSSES",
            )
    found = {_FIELDS[name]: number(row, name) for name in NUMBERS[kind]}
    return {name: value for name, value in found.items() if value is not None}


def _list(row: Mapping[str, Any], name: str, count: int) -> list[Any] | None:
    value = row.get(name)
    if value is None or (isinstance(value, str) and value == ""):
        return None
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
        raise BadRow(f"bad {name}", f"{name} is a list with a number per answer; got {value!r}")
    if len(found := list(value)) != count:
        raise BadRow(f"bad {name}", f"{name} has one number per answer, {count}; got {len(found)}")
    return found


def _rank(value: Any) -> int:
    """A rank; missing or -1 is unranked, which is below all ranked answers."""
    found = number({"rank": value}, "rank")
    if found is None:
        return -1
    if found < -1 or found != int(found):
        raise BadRow("bad ranking", f"a rank is a whole number, 0 for the best; got {value!r}")
    return int(found)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


class Labels:
    """The labels of all usable rows: what a batch holds besides its content.

    Args:
        rows: the number of each row in the data.
        labels: of each row.
        given: the numbers that some row has, where that is known without looking at all of them.
        scored: whether some row has scores, likewise.
    """

    def __init__(
        self,
        rows: Sequence[int],
        labels: Sequence[Label],
        *,
        given: Iterable[str] | None = None,
        scored: bool | None = None,
    ) -> None:
        self.rows = rows
        self.labels = labels
        if given is None:
            given = (name for label in labels for name in label.numbers)
        self.given = set(given)
        self.scored = any(label.score for label in labels) if scored is None else scored

    def batch(self, content: Any, indices: Sequence[int]) -> Batch:
        """The batch of the given rows, whose answers `content` holds in the same order."""
        labels = [self.labels[index] for index in indices]
        sizes = torch.tensor([len(label.rank) for label in labels], dtype=torch.int64)
        scores = [label.score or (math.nan,) * len(label.rank) for label in labels]
        columns: dict[str, Any] = {
            name: torch.tensor(
                [label.numbers.get(name, _NEUTRAL[name]) for label in labels], dtype=torch.float32
            )
            for name in self.given
        }
        desirable = [label.desirable for label in labels if label.desirable is not None]
        return Batch(
            content=content,
            group=torch.arange(len(labels)).repeat_interleave(sizes),
            rank=torch.tensor([r for label in labels for r in label.rank], dtype=torch.int64),
            position=torch.arange(len(labels)),
            row_id=torch.tensor([self.rows[index] for index in indices], dtype=torch.int64),
            score=torch.tensor([s for row in scores for s in row]) if self.scored else None,
            desirable=torch.tensor(desirable, dtype=torch.bool) if desirable else None,
            **columns,
        )

    def mismatched(self, indices: Sequence[int], prompts: Sequence[Hashable]) -> list[int]:
        """For each of a global batch's rows the place of the next one, around the end, that has
        another prompt and a weight above 0; its own where there is none.

        So a row of weight 0 is absent, and one of weight 2 is there twice: its copy has its prompt.
        """
        num = len(indices)
        present = [self.labels[i].numbers.get("weight", 1.0) > 0 for i in indices]
        return [
            next(
                (
                    other
                    for other in ((place + step) % num for step in range(1, num))
                    if present[other] and prompts[other] != prompts[place]
                ),
                place,
            )
            for place in range(num)
        ]


def fingerprint(labels: Labels, contents: Iterable[Sequence[bytes]]) -> str:
    """A digest of rows: their numbers, what they say, and the parts that they are made of."""
    digest = hashlib.blake2b(digest_size=16)
    for row, label, parts in zip(labels.rows, labels.labels, contents, strict=True):
        said = (label.rank, label.score, label.desirable, sorted(label.numbers.items()))
        digest.update(f"{row} {said} {[len(part) for part in parts]}".encode())
        for part in parts:
            digest.update(part)
    return digest.hexdigest()
