"""Asking a judge which of two answers is better, in both orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.protocols import PreferenceJudge
from alignkit.scoring import Rows, Score, ask, probabilities


@dataclass(frozen=True)
class Verdicts:
    """What a judge said of two answers to each prompt, asked in both orders.

    Attributes:
        preferences: P(second beats first), the mean of both orders; None where it said nothing.
        flips: of the prompts with an answer in both orders, how many verdicts changed with it.
        asked_twice: how many prompts those are.
    """

    preferences: list[Score]
    flips: int
    asked_twice: int


def verdicts_of(
    judge: PreferenceJudge,
    name: str,
    prompts: Sequence[Any],
    first: Sequence[Any],
    second: Sequence[Any],
    rows: Rows,
) -> Verdicts:
    """Which of two answers a judge prefers; a liking for the first or second place cancels.

    Raises:
        DataError: the judge failed, or an answer is no probability; naming the prompt.
    """
    who = f"judge {name!r}"
    there = probabilities(ask(judge, who, [prompts, second, first, rows]), who, prompts)
    back = probabilities(ask(judge, who, [prompts, first, second, rows]), who, prompts)
    both = [
        [one, None if other is None else 1 - other] for one, other in zip(there, back, strict=True)
    ]
    given = [[value for value in pair if value is not None] for pair in both]
    decided = [pair for pair in given if len(pair) == 2]
    return Verdicts(
        [sum(pair) / len(pair) if pair else None for pair in given],
        sum((one > 0.5) != (other > 0.5) or (one < 0.5) != (other < 0.5) for one, other in decided),
        len(decided),
    )
