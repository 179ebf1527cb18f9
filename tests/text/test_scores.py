"""Reward models as rewards and judges, and several as one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from alignkit import GenerationOptions, LoRA, TextOptions
from alignkit.ensembles import EnsembleReward
from alignkit.errors import ConfigError
from alignkit.reward_names import reward_of
from alignkit.text import build, load_judge, load_reward
from alignkit.text.rated_rows import question
from alignkit.text.scalar_wing import Scale
from alignkit.text.scores import CritiqueReward
from tests.builders import move, text_wing, tiny_lm, tiny_tokenizer

PROMPTS = ["What is red?", "What is blue?", "What is red?"]
ANSWERS = ["A rose.", "The sky in the evening is blue and grey.", "An apple, I think."]


def saved(folder: Path, *, adapter: LoRA | None = None, **scale: Any) -> Any:
    """A reward model of conversations, in a folder."""
    tiny_lm().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    wing = build(folder / "base", scalar=Scale(**scale), adapter=adapter)
    move(wing.module)
    wing.chat = True
    wing.save(folder / "model")
    return wing


def texts(tokenizer: Any) -> list[list[int]]:
    """The conversations as the chat template writes them."""
    found = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        found.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return found


def test_a_folder_scores_as_transformers_does_in_the_order_asked(tmp_path: Path) -> None:
    """Bare strings are turns of a conversation; answers to one prompt need not stand together."""
    saved(tmp_path, scale=2.0, offset=0.5)
    reward = reward_of(str(tmp_path), "text")
    found = reward(PROMPTS, ANSWERS)
    raw = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        for score, ids in zip(found, texts(tiny_tokenizer()), strict=True):
            expected = 2 * raw(torch.tensor([ids])).logits.item() + 0.5
            assert score == pytest.approx(expected, abs=1e-4)
    assert reward([], []) == []
    alone = [reward([p], [a])[0] for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    assert found == pytest.approx(alone, abs=1e-5), "of its own answer alone"


def test_an_adapter_is_a_reward_too(tmp_path: Path) -> None:
    wing = saved(tmp_path, adapter=LoRA(rank=2))
    other = load_reward(tmp_path)
    assert other.wing.adapter == "continued"
    move(wing.module, 0.0)
    assert other(PROMPTS, ANSWERS) == load_reward(tmp_path / "model")(PROMPTS, ANSWERS)
    assert len(set(other(PROMPTS, ANSWERS))) == 3


def test_centring_shifts_all_scores_alike(tmp_path: Path) -> None:
    saved(tmp_path)
    reward = load_reward(tmp_path)
    before = reward(PROMPTS, ANSWERS)
    reward.centred_on(PROMPTS, ANSWERS)
    after = reward(PROMPTS, ANSWERS)
    assert sum(after) == pytest.approx(0, abs=1e-5)
    shifts = [one - other for one, other in zip(before, after, strict=True)]
    assert shifts == pytest.approx([shifts[0]] * 3, abs=1e-5)


def test_a_pairwise_model_judges_and_is_no_reward(tmp_path: Path) -> None:
    saved(tmp_path, pairwise=True)
    judge = load_judge(tmp_path)
    there = judge(PROMPTS, ANSWERS, ANSWERS[::-1])
    back = judge(PROMPTS, ANSWERS[::-1], ANSWERS)
    for one, other in zip(there, back, strict=True):
        assert one + other == pytest.approx(1, abs=1e-6)
    assert judge(PROMPTS, ANSWERS, ANSWERS) == pytest.approx([0.5] * 3, abs=1e-6)
    assert abs(there[0] - 0.5) > 1e-3
    with pytest.raises(ConfigError, match="judge="):
        load_reward(tmp_path)


def test_a_scorer_judges_by_bradley_terry(tmp_path: Path) -> None:
    saved(tmp_path)
    reward, judge = load_reward(tmp_path), load_judge(tmp_path)
    gaps = [
        a - b for a, b in zip(reward(PROMPTS, ANSWERS), reward(PROMPTS, ANSWERS[::-1]), strict=True)
    ]
    expected = [1 / (1 + math.exp(-gap)) for gap in gaps]
    assert judge(PROMPTS, ANSWERS, ANSWERS[::-1]) == pytest.approx(expected, abs=1e-5)


def test_a_language_model_is_no_reward(tmp_path: Path) -> None:
    tiny_lm().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="scores no answers"):
        load_reward(tmp_path)


class Written:
    """A critic's wing that writes what it is told."""

    def __init__(self, texts: list[str]) -> None:
        self.wing, self.texts = text_wing(), texts
        self.wing.chat = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wing, name)

    def sample(self, prompts: Any, options: Any, *, seed: int) -> list[str]:
        assert "A rose." in prompts[0][0]["content"]
        return self.texts[: len(prompts)]


def test_a_critic_scores_by_what_its_verdicts_are_worth() -> None:
    """Against the verdicts' likelihoods one by one; what reaches none is missing and counted."""
    wing: Any = Written(["Good.\nVerdict: 2", "It goes on and on", "Bad.\nVerdict: 1"])
    move(wing.wing.module)
    critic = CritiqueReward(wing, {"1": 0.0, "2": 10.0}, generation=GenerationOptions())
    found = critic(PROMPTS, ANSWERS)
    assert found[1] is None and critic.unfinished == 1
    logits = []
    for verdict in ("1", "2"):
        row = {
            "prompt": question(PROMPTS[0], ANSWERS[0], True),
            "completion": f"Good.\nVerdict: {verdict}",
            "label": True,
        }
        batch = wing.wing.examples([row], TextOptions(), kind="unpaired", seed=0).collate([0], [0])
        with torch.no_grad():
            logits.append(float(wing.wing.module(batch).total))
    share = 1 / (1 + math.exp(logits[0] - logits[1]))
    assert found[0] == pytest.approx(10 * share, abs=1e-4)
    twice = CritiqueReward(wing, critic.worth, critiques=2)
    assert twice(PROMPTS, ANSWERS)[0] == pytest.approx(found[0]), "of equal critiques"


def test_ensembles_against_hand_worked_values() -> None:
    members = [[1, 2, 0], [1.5, 0.5, 0.2], [0.8, 1.4, -0.4]]
    rewards = [lambda p, r, rows=None, one=one: one for one in members]
    expected = {
        "mean": [1.1, 1.3, -0.0666667],
        "min": [0.8, 0.5, -0.4],
        "mean_minus_std": [1.1 - 0.0866667**0.5, 1.3 - 0.38**0.5, -0.0666667 - 0.0622222**0.5],
    }
    for combine, values in expected.items():
        found = EnsembleReward(rewards, combine)(["p"] * 3, ["a"] * 3)
        assert found == pytest.approx(values, abs=1e-6)
    with_gap = EnsembleReward([rewards[0], lambda p, r, rows=None: [None, 1.0, 1.0]], "min")
    assert with_gap(["p"] * 3, ["a"] * 3) == [None, 1.0, 0.0], "missing stays missing"
    with pytest.raises(ConfigError, match="at least two"):
        EnsembleReward(rewards[:1])
    with pytest.raises(ConfigError, match="mean"):
        EnsembleReward(rewards, "median")
