"""From answers and what is thought of them to rows, by hand-worked numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from alignkit.errors import DataError
from alignkit.preferences import Judged, by_judge, by_reward, preference_row

ROWS = [{"prompt": "a", "tag": 1}, {"prompt": "b", "tag": 2}]
ANSWERS = [["x", "yy", "zzz"], ["long", "s"]]


def test_a_reward_is_asked_once_with_the_rows_of_the_answers() -> None:
    asked: list[Any] = []

    def reward(prompts: Any, responses: Any, rows: Any) -> list[float]:
        asked.append((prompts, responses, [row["tag"] for row in rows]))
        return [10 * row["tag"] - len(text) for text, row in zip(responses, rows, strict=True)]

    found = by_reward(reward, ROWS, ANSWERS)
    assert asked == [(list("aaabb"), ["x", "yy", "zzz", "long", "s"], [1, 1, 1, 2, 2])]
    assert [judged.scores for judged in found] == [(9, 8, 7), (16, 19)]


def test_named_parts_are_added_and_a_missing_one_is_missing() -> None:
    def reward(prompts: Any, responses: Any, rows: Any) -> dict[str, list[float | None]]:
        return {"good": [1, 2, None, 4, None], "short": [0.5] * 5}

    found = by_reward(reward, ROWS, ANSWERS)
    assert [judged.scores for judged in found] == [(1.5, 2.5, None), (4.5, None)]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([1, 2], "one number per prompt; it returned 2 for 5"),
        (3, "a sequence of numbers"),
        ([math.inf] * 5, "finite"),
        ([1, math.nan, 1, 1, 1], "nan for the prompt 'a'"),
    ],
)
def test_rewards_that_answer_otherwise(answer: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        by_reward(lambda *_: answer, ROWS, ANSWERS)


WINS = {("x", "yy"): 0.7, ("yy", "x"): 0.1, ("x", "zzz"): 0.6, ("zzz", "x"): 0.2,
        ("yy", "zzz"): 0.9, ("zzz", "yy"): 0.3, ("long", "s"): 0.4, ("s", "long"): 0.4}  # fmt: skip


def test_a_judge_is_asked_in_both_orders() -> None:
    def judge(prompts: Any, a: Any, b: Any, rows: Any) -> list[float]:
        assert [row["prompt"] for row in rows] == prompts and len(prompts) == 8
        return [WINS[pair] for pair in zip(a, b, strict=True)]

    first, second = by_judge(judge, ROWS, ANSWERS)
    # P(x beats yy) = (.7 + 1 - .1) / 2 = .8, and so on; a score is the mean over the two others.
    assert first.wins[0, 1] == pytest.approx(0.8) and first.wins[1, 0] == pytest.approx(0.2)
    assert first.scores == pytest.approx(((0.8 + 0.7) / 2, (0.2 + 0.8) / 2, (0.3 + 0.2) / 2))
    assert second.scores == pytest.approx((0.5, 0.5))


def test_a_liking_for_the_first_place_cancels() -> None:
    found = by_judge(lambda p, a, b, rows: [0.9] * len(a), ROWS, ANSWERS)
    assert all(score == pytest.approx(0.5) for judged in found for score in judged.scores)
    rows = [
        preference_row(r, "responses", a, j) for r, a, j in zip(ROWS, ANSWERS, found, strict=True)
    ]
    assert rows == [None, None]


def test_failed_verdicts_are_missing() -> None:
    def judge(prompts: Any, a: Any, b: Any, rows: Any) -> list[float | None]:
        return [None if "zzz" in pair else WINS[pair] for pair in zip(a, b, strict=True)]

    first, _ = by_judge(judge, ROWS, ANSWERS)
    assert first.scores == (pytest.approx(0.8), pytest.approx(0.2), None)
    with pytest.raises(DataError, match=r"between 0 and 1; it gave 1\.5"):
        by_judge(lambda p, a, b, rows: [1.5] * len(a), ROWS, ANSWERS)


def test_the_row_holds_best_worst_and_all() -> None:
    judged = Judged((0.2, None, 0.9, 0.4), {(2, 0): 0.85})
    answers = ["a", "b", "c", "d"]
    row = preference_row({"prompt": "p"}, "responses", answers, judged, soft_labels=True)
    assert row == {
        "prompt": "p",
        "responses": answers,
        "scores": [0.2, None, 0.9, 0.4],
        "chosen": "c",
        "rejected": "a",
        "score_chosen": 0.9,
        "score_rejected": 0.2,
        "p_chosen": 0.85,
    }
    for scores in ((None, None), (0.5, None), (0.5, 0.5), ()):
        assert preference_row({"prompt": "p"}, "responses", answers, Judged(scores, {})) is None
