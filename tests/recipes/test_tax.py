"""The alignment tax: each measure against the model's own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignkit import DataError, GenerationOptions
from alignkit.recipes.tax import Tasks, compared, measure
from alignkit.text import build
from tests.builders import move, tiny_lm, tiny_tokenizer

WORDS = ["the sky is", "a red fox", "grey", "some tea in the evening", "water", "No."]


@pytest.fixture(scope="module")
def wing() -> Any:
    model = tiny_lm("llama")
    move(model, 0.3)
    return build((model, tiny_tokenizer(chat=False)))


def logps(wing: Any, prompt: str, answer: str) -> torch.Tensor:
    """Of the answer's tokens and the closing eos, by the model alone."""
    tokenizer = wing.tokenizer
    first = tokenizer(prompt)["input_ids"]
    ids = [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
    assert ids[: len(first)] == first, "the prompt ends where a token does"
    with torch.no_grad():
        logits = wing.policy(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    found = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return found[len(first) - 1 :]


def test_multiple_choice_takes_the_likeliest_answer(wing: Any) -> None:
    rows = []
    for number, prompt in enumerate(["What is it?", "Who?", "Is it so?"] * 30):
        choices = [f" {WORDS[(number + k) % 6]}" for k in range(2 + number % 3)]
        rows.append({"prompt": prompt, "choices": choices, "answer": number % 2})
    found = measure(wing, Tasks(multiple_choice=rows), GenerationOptions())["multiple choice"]
    expected = [
        max(range(len(r["choices"])), key=lambda k: logps(wing, r["prompt"], r["choices"][k]).sum())
        == r["answer"]
        for r in rows
    ]
    assert found.tolist() == [float(right) for right in expected]
    assert 0 < sum(expected) < len(rows)


def test_exact_match_and_loss(wing: Any) -> None:
    options = GenerationOptions(max_new_tokens=4)
    prompts = ["What is it?", "Who?"]
    greedy = wing.sample(prompts, GenerationOptions(max_new_tokens=4, temperature=0.0), seed=0)
    exact = [{"prompt": p, "answer": a} for p, a in zip(prompts, [greedy[0], "no"], strict=True)]
    text = [{"prompt": "Who?", "completion": f" {word}"} for word in WORDS]
    found = measure(wing, Tasks(exact_match=exact, text=text), options)
    assert found["exact match"].tolist() == [1.0, 0.0]
    losses = [-logps(wing, "Who?", f" {word}").mean().item() for word in WORDS]
    assert found["loss per token"] == pytest.approx(losses, abs=1e-5)
    rows = compared(found, {**found, "loss per token": found["loss per token"] + 0.5})
    assert [row.verdict for row in rows] == ["no clear change", "worse"]


def test_tasks_that_cannot_be_read(wing: Any) -> None:
    with pytest.raises(DataError, match="Task 0 of multiple choice"):
        measure(wing, Tasks(multiple_choice=[{"prompt": "?", "answer": 0}]), GenerationOptions())
