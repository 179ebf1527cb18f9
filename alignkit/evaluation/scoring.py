"""Asking a reward or a judge, and believing nothing that is not an answer to the question."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignkit.errors import AlignkitError, DataError
from alignkit.protocols import PreferenceJudge, Reward

Score = float | None
"""None is missing, and never 0."""
Rows = Sequence[Mapping[str, Any]]


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


def scores_of(
    reward: Reward, name: str, prompts: Sequence[Any], answers: Sequence[Any], rows: Rows
) -> dict[str, list[Score]]:
    """Scores by name: "" for the total, and the reward's named parts where it has several.

    Raises:
        DataError: the reward failed, or gave something else than one number, or None, per answer;
            naming the prompt.
    """
    question = [prompts, answers, rows]
    found = _ask(reward, f"reward {name!r}", question)
    if not isinstance(found, Mapping):
        return {"": _numbers(found, f"reward {name!r}", prompts)}
    parts = {
        str(part): _numbers(values, f"reward {name!r} (part {part!r})", prompts)
        for part, values in found.items()
    }
    totals = [_sum(values) for values in zip(*parts.values(), strict=True)]
    return {"": totals} if len(parts) == 1 else {"": totals, **parts}


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
        DataError: as `scores_of`, or an answer is no probability.
    """
    who = f"judge {name!r}"
    there = _numbers(_ask(judge, who, [prompts, second, first, rows]), who, prompts)
    back = _numbers(_ask(judge, who, [prompts, first, second, rows]), who, prompts)
    for prompt, *values in zip(prompts, there, back, strict=True):
        for value in values:
            if value is not None and not 0 <= value <= 1:
                raise DataError(
                    f"The {who} answers with probabilities between 0 and 1; it gave {value} for "
                    f"the prompt {_short(prompt)}."
                )
    both = [
        [there[i], None if back[i] is None else 1 - back[i]]  # type: ignore[operator]
        for i in range(len(prompts))
    ]
    given = [[value for value in pair if value is not None] for pair in both]
    decided = [pair for pair in given if len(pair) == 2]
    return Verdicts(
        [sum(pair) / len(pair) if pair else None for pair in given],
        sum((one > 0.5) != (other > 0.5) or (one < 0.5) != (other < 0.5) for one, other in decided),
        len(decided),
    )


def _ask(function: Callable[..., Any], who: str, question: Sequence[Sequence[Any]]) -> Any:
    """The function's answer; if it fails, the first prompt that it fails on by itself is named."""
    try:
        return function(*question)
    except AlignkitError:
        raise
    except Exception as error:
        prompts = question[0]
        for place, prompt in enumerate(prompts):
            try:
                function(*[column[place : place + 1] for column in question])
            except Exception as own:
                raise DataError(
                    f"The {who} failed on prompt {place} (counted from 0), {_short(prompt)}: "
                    f"{type(own).__name__}: {own}. Return None where there is no score."
                ) from own
        raise DataError(
            f"The {who} failed on {len(prompts)} prompts at once, though on none alone; the first "
            f"is {_short(prompts[0])}: {type(error).__name__}: {error}."
        ) from error


def _numbers(found: Any, who: str, prompts: Sequence[Any]) -> list[Score]:
    try:
        values = found.tolist() if hasattr(found, "tolist") else list(found)
    except TypeError as error:
        raise DataError(
            f"The {who} returns a sequence of numbers, one per prompt; it returned {found!r} for "
            f"{len(prompts)} prompts, the first of them {_short(prompts[0])}."
        ) from error
    if len(values) != len(prompts):
        place = min(len(values), len(prompts) - 1)
        raise DataError(
            f"The {who} returns one number per prompt; it returned {len(values)} for "
            f"{len(prompts)}. Is prompt {place}, {_short(prompts[place])}, the first without one? "
            "Return None where there is no score."
        )
    return [_number(value, who, prompt) for value, prompt in zip(values, prompts, strict=True)]


def _number(value: Any, who: str, prompt: Any) -> Score:
    if value is None:
        return None
    try:
        number = float(np.asarray(value).item())
    except (TypeError, ValueError) as error:
        raise DataError(
            f"The {who} returns numbers; it gave {value!r} for the prompt {_short(prompt)}."
        ) from error
    if not math.isfinite(number):
        raise DataError(
            f"The {who} returns finite numbers; it gave {number} for the prompt {_short(prompt)}. "
            "Return None where there is no score."
        )
    return number


def _sum(values: Sequence[Score]) -> Score:
    """A sum with a part missing is missing."""
    given = [value for value in values if value is not None]
    return math.fsum(given) if len(given) == len(values) else None


def _short(prompt: Any) -> str:
    text = repr(prompt)
    return text if len(text) <= 120 else f"{text[:117]}..."
