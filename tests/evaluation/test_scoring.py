"""Rewards and judges that misbehave are named with the prompt, and nothing missing becomes 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignkit.errors import DataError
from alignkit.evaluation.verdicts import verdicts_of
from alignkit.scoring import scores_of

PROMPTS = ["one", "two", "three"]
ROWS = [{"prompt": prompt} for prompt in PROMPTS]


def ask(found: Any) -> dict[str, list[float | None]]:
    def reward(prompts: Any, responses: Any, rows: Any) -> Any:
        return found(prompts) if callable(found) else found

    return scores_of(reward, "mine", PROMPTS, ["x", "y", "z"], ROWS)


def test_scores_come_through_and_missing_ones_stay_missing() -> None:
    assert ask([1, None, 2.5]) == {"": [1.0, None, 2.5]}
    assert ask(torch.tensor([1.0, 2, 3])) == {"": [1.0, 2.0, 3.0]}
    parts = ask({"a": [1, None, 3], "b": [1, 1, -1]})
    assert parts == {"": [2.0, None, 2.0], "a": [1.0, None, 3.0], "b": [1.0, 1.0, -1.0]}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([1.0, float("nan"), 2.0], r"nan for the prompt 'two'\. Return None"),
        ([1.0, 2.0, float("inf")], "inf for the prompt 'three'"),
        ([1.0, 2.0], r"returned 2 for 3\. Is prompt 2, 'three'"),
        ([1.0] * 4, "returned 4 for 3"),
        (7.0, "sequence of numbers.*'one'"),
        (["good", 1, 2], "'good' for the prompt 'one'"),
        ({"a": [1, 2, 3], "b": [1, 2]}, r"part 'b'.*returned 2 for 3"),
    ],
)
def test_wrong_answers_are_refused_naming_the_prompt(found: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        ask(found)


def test_a_reward_that_fails_names_the_prompt_it_failed_on() -> None:
    def picky(prompts: list[str]) -> list[float]:
        if "two" in prompts:
            raise ValueError("too hard")
        return [1.0] * len(prompts)

    with pytest.raises(DataError, match=r"prompt 1 .* 'two': ValueError: too hard") as caught:
        ask(picky)
    assert isinstance(caught.value.__cause__, ValueError)

    def batch_shy(prompts: list[str]) -> list[float]:
        if len(prompts) > 1:
            raise RuntimeError("one at a time")
        return [1.0]

    with pytest.raises(DataError, match=r"3 prompts at once.*'one'"):
        ask(batch_shy)


def test_a_judge_is_asked_in_both_orders() -> None:
    def judge(prompts: Any, a: Any, b: Any, rows: Any) -> list[float | None]:
        """Likes the first place; knows nothing of "two"; is sure that "good" beats all."""
        return [
            None if p == "two" else 1.0 if one == "good" else 0.0 if two == "good" else 0.9
            for p, one, two in zip(prompts, a, b, strict=True)
        ]

    said = verdicts_of(judge, "it", PROMPTS, ["x", "x", "x"], ["good", "y", "y"], ROWS)
    assert said.preferences == [1.0, None, pytest.approx(0.5)]
    assert (said.flips, said.asked_twice) == (1, 2)
    one_sided = verdicts_of(
        lambda p, a, b, r: [0.8 if one == "y" else None for one in a],
        "it",
        PROMPTS,
        ["x"] * 3,
        ["y"] * 3,
        ROWS,
    )
    assert one_sided.preferences == [0.8] * 3 and one_sided.asked_twice == 0
    with pytest.raises(DataError, match=r"it gave 1.5 for the prompt 'one'"):
        verdicts_of(lambda *_: [1.5, 0, 0], "it", PROMPTS, ["x"] * 3, ["y"] * 3, ROWS)
