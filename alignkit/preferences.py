"""From sampled answers to preference rows, by a reward or a judge.

The rows are those of pairs and of rankings at once: `chosen` and `rejected` are the best and the
worst answer, and all answers stand beside them with their scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from alignkit.protocols import PreferenceJudge, Reward
from alignkit.scoring import Score, ask, probabilities, scores_of

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Judged:
    """K answers to one prompt and what was thought of them.

    Attributes:
        scores: one per answer; higher is better.
        wins: (i, j) -> probability that answer i beats j, if a judge said so.
    """

    scores: tuple[Score, ...]
    wins: Mapping[tuple[int, int], float]


def by_reward(
    reward: Reward, rows: Sequence[Row], answers: Sequence[Sequence[Any]]
) -> list[Judged]:
    """Score every answer of every row in one call; named parts are added up.

    Args:
        reward: `(prompts, responses, rows) -> scores`.
        rows: with `prompt`.
        answers: of each row.

    Raises:
        DataError: the reward failed, or gave something else than one number, or None, for each
            answer.
    """
    asked = [(row, answer) for row, given in zip(rows, answers, strict=True) for answer in given]
    totals = iter(
        scores_of(
            reward,
            _name(reward),
            [row["prompt"] for row, _ in asked],
            [a for _, a in asked],
            [r for r, _ in asked],
        )[""]
    )
    return [Judged(tuple(next(totals) for _ in given), {}) for given in answers]


def by_judge(
    judge: PreferenceJudge, rows: Sequence[Row], answers: Sequence[Sequence[Any]]
) -> list[Judged]:
    """Compare all answers of each row with one another, in one call.

    Every two are shown in both orders, so that a liking for the first or second place cancels. An
    answer's score is its mean probability of beating another answer of its prompt.

    Args:
        judge: `(prompts, a, b, rows) -> P(a beats b)`.
        rows: with `prompt`.
        answers: of each row.

    Raises:
        DataError: if there is not one probability, or None, for each comparison.
    """
    asked = [
        (number, i, j)
        for number, given in enumerate(answers)
        for i, j in permutations(range(len(given)), 2)
    ]
    who, prompts = f"judge {_name(judge)!r}", [rows[number]["prompt"] for number, _, _ in asked]
    question = [
        prompts,
        [answers[number][i] for number, i, _ in asked],
        [answers[number][j] for number, _, j in asked],
        [rows[number] for number, _, _ in asked],
    ]
    values = probabilities(ask(judge, who, question), who, prompts)
    said = dict(zip(asked, values, strict=True))
    return [_of_comparisons(said, number, len(given)) for number, given in enumerate(answers)]


def _of_comparisons(said: Mapping[tuple[int, int, int], Score], number: int, count: int) -> Judged:
    wins: dict[tuple[int, int], float] = {}
    for i, j in permutations(range(count), 2):
        there, back = said[number, i, j], said[number, j, i]
        both = [there, None if back is None else 1 - back]
        if given := [value for value in both if value is not None]:
            wins[i, j] = sum(given) / len(given)
    beaten = [[p for (one, _), p in wins.items() if one == i] for i in range(count)]
    return Judged(tuple(sum(p) / len(p) if p else None for p in beaten), wins)


def preference_row(
    row: Row, name: str, answers: Sequence[Any], judged: Judged, *, soft_labels: bool = False
) -> dict[str, Any] | None:
    """The row of a prompt's answers, or None if they prefer nothing: fewer than two scores, or all
    equal.

    Args:
        row: with `prompt`.
        name: of the column of all answers: "responses" or "images".
        answers: as they are to stand in the row.
        judged: what was thought of them.
        soft_labels: give the judge's probability that chosen beats rejected as `p_chosen`.
    """
    scored = {place: score for place, score in enumerate(judged.scores) if score is not None}
    if not scored or len(set(scored.values())) == 1:
        return None
    best = max(scored, key=scored.__getitem__)
    worst = min(scored, key=scored.__getitem__)
    found = {
        "prompt": row["prompt"],
        name: list(answers),
        "scores": list(judged.scores),
        "chosen": answers[best],
        "rejected": answers[worst],
        "score_chosen": scored[best],
        "score_rejected": scored[worst],
    }
    return {**found, "p_chosen": judged.wins[best, worst]} if soft_labels else found


def _name(given: Any) -> str:
    """What errors call a reward or judge."""
    return getattr(given, "name", getattr(given, "__name__", type(given).__name__))
