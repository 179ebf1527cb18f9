"""Asking a reward, scorer or judge, and believing nothing that is not an answer to the question.

Everybody who has answers scored asks through here: online methods, relabelling, evaluation.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from alignkit.errors import AlignkitError, DataError
from alignkit.protocols import Reward

Score = float | None
"""None is missing, and never 0: a failed answer is not a bad one."""
Rows = Sequence[Mapping[str, Any]]
Question = Sequence[Sequence[Any] | None]
"""The columns that a function is asked with, prompts first."""


def scores_of(
    reward: Reward,
    name: str,
    prompts: Sequence[Any],
    answers: Sequence[Any],
    rows: Rows | None = None,
    *,
    timeout: float | None = None,
) -> dict[str, list[Score]]:
    """Scores by name: "" for the total, and the reward's named parts where it has several.

    Args:
        reward: `(prompts, responses, rows) -> scores`, or named parts that add up to the total.
        name: of the reward, for errors.
        prompts, answers, rows: of the same length.
        timeout: seconds after which a reward that has not returned is given up.

    Raises:
        DataError: the reward failed, took too long, or gave something else than one number, or
            None, per answer; naming the prompt.
    """
    who = f"reward {name!r}"
    found = ask(reward, who, [prompts, answers, rows], timeout=timeout)
    if not isinstance(found, Mapping):
        return {"": numbers(found, who, prompts)}
    parts = {
        str(part): numbers(values, f"{who} (part {part!r})", prompts)
        for part, values in found.items()
    }
    if not parts:
        raise DataError(f"The {who} returned no part; it returns scores, or named parts of them.")
    totals = [total(values) for values in zip(*parts.values(), strict=True)]
    return {"": totals} if len(parts) == 1 else {"": totals, **parts}


def total(values: Sequence[Score]) -> Score:
    """A sum with a part missing is missing."""
    given = [value for value in values if value is not None]
    return math.fsum(given) if len(given) == len(values) else None


def ask(
    function: Callable[..., Any],
    who: str,
    question: Question,
    *,
    timeout: float | None = None,
) -> Any:
    """The function's answer; if it fails, the first prompt that it fails on by itself is named."""
    prompts = question[0]
    assert prompts is not None
    if not prompts and not hasattr(function, "bind"):  # one that is bound meets the others
        return []
    try:
        return _within(timeout, function, who, question)
    except AlignkitError:
        raise
    except Exception as error:
        for place, prompt in enumerate(prompts):
            one = [None if column is None else column[place : place + 1] for column in question]
            try:
                _within(timeout, function, who, one)
            except AlignkitError:
                raise
            except Exception as own:
                raise DataError(
                    f"The {who} failed on prompt {place} (counted from 0), {short(prompt)}: "
                    f"{type(own).__name__}: {own}. Return None where there is no score."
                ) from own
        raise DataError(
            f"The {who} failed on {len(prompts)} prompts at once, though on none alone; the first "
            f"is {short(prompts[0])}: {type(error).__name__}: {error}."
        ) from error


def _within(
    timeout: float | None, function: Callable[..., Any], who: str, question: Question
) -> Any:
    """The call, given up after `timeout` seconds.

    A call that hangs cannot be ended from outside. It is left behind in a thread that does not keep
    the process alive; the run that failed on it can be resumed.
    """
    if timeout is None:
        return function(*question)
    found: list[Any] = []
    failed: list[BaseException] = []

    def call() -> None:
        try:
            found.append(function(*question))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=call, name="alignkit-reward", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        prompts = question[0]
        assert prompts is not None
        raise DataError(
            f"The {who} did not return within {timeout:g} seconds for {len(prompts)} prompts, the "
            f"first of them {short(prompts[0])}. Return None where there is no score, or raise the "
            "timeout; the run resumes from its last checkpoint."
        )
    if failed:
        raise failed[0]
    return found[0]


def numbers(found: Any, who: str, prompts: Sequence[Any]) -> list[Score]:
    """One finite number, or None, per prompt, of what a reward or judge returned.

    Raises:
        DataError: it is something else; naming the prompt.
    """
    try:
        values = found.tolist() if hasattr(found, "tolist") else list(found)
    except TypeError as error:
        raise DataError(
            f"The {who} returns a sequence of numbers, one per prompt; it returned {found!r} for "
            f"{len(prompts)} prompts, the first of them {short(prompts[0])}."
        ) from error
    if len(values) != len(prompts):
        place = min(len(values), len(prompts) - 1)
        raise DataError(
            f"The {who} returns one number per prompt; it returned {len(values)} for "
            f"{len(prompts)}. Is prompt {place}, {short(prompts[place])}, the first without one? "
            "Return None where there is no score."
        )
    return [_number(value, who, prompt) for value, prompt in zip(values, prompts, strict=True)]


def probabilities(found: Any, who: str, prompts: Sequence[Any]) -> list[Score]:
    """The same, each between 0 and 1."""
    values = numbers(found, who, prompts)
    for prompt, value in zip(prompts, values, strict=True):
        if value is not None and not 0 <= value <= 1:
            raise DataError(
                f"The {who} answers with probabilities between 0 and 1; it gave {value} for the "
                f"prompt {short(prompt)}."
            )
    return values


def _number(value: Any, who: str, prompt: Any) -> Score:
    if value is None:
        return None
    try:
        number = float(np.asarray(value).item())
    except (TypeError, ValueError) as error:
        raise DataError(
            f"The {who} returns numbers; it gave {value!r} for the prompt {short(prompt)}."
        ) from error
    if not math.isfinite(number):
        raise DataError(
            f"The {who} returns finite numbers; it gave {number} for the prompt {short(prompt)}. "
            "Return None where there is no score."
        )
    return number


def short(prompt: Any) -> str:
    """A prompt as errors show it."""
    text = repr(prompt)
    return text if len(text) <= 120 else f"{text[:117]}..."
