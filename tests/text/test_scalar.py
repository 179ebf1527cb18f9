"""Scores and values of answers under a trunk with a scalar head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from alignkit import LoRA, TextOptions
from alignkit.errors import ConfigError
from alignkit.text import build
from alignkit.text.notes import NOTES
from alignkit.text.scalar import TextScalar
from alignkit.text.scalar_models import scalar_of
from alignkit.text.scalar_wing import Scale
from tests.builders import move, pair_rows, text_wing, tiny_lm, tiny_tokenizer
from tests.text.models import make
from tests.text.test_packing import SHAPES, batch_of

WANT = frozenset({"values", "token_mask"})


def by_hand(model: Any, prompt: Any, completion: Any) -> tuple[Tensor, Tensor]:
    """Of one answer, alone and without padding: the value before each token, and after the last."""
    ids = torch.tensor([[*prompt.tolist(), *completion.tolist()]])
    hidden = getattr(model, model.base_model_prefix)(input_ids=ids).last_hidden_state[0]
    values = hidden @ model.score.weight[0]
    return values[len(prompt) - 1 : -1], values[-1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
@torch.no_grad()
def test_values_are_those_of_each_answer_alone_in_every_layout(family: str) -> None:
    model = scalar_of(make(family), copied=False, seed=3).eval()
    module, batch = TextScalar(model), batch_of(SHAPES)
    content = batch.content
    for layout in ("padded", "varlen", "prefix"):
        found = module(replace(batch, content=replace(content, layout=layout)), want=WANT)
        for answer, completion in enumerate(content.completions):
            values, last = by_hand(model, content.prompts[content.owner[answer]], completion)
            torch.testing.assert_close(found.total[answer], last, rtol=1e-5, atol=1e-5)
            row, mask = found.extras["values"][answer], found.extras["token_mask"][answer]
            assert int(mask.sum()) == len(completion) == int(found.length[answer])
            torch.testing.assert_close(row[: len(completion)], values, rtol=1e-5, atol=1e-5)
            assert not row[len(completion) :].any() and not mask[len(completion) :].any()


def test_gradients_are_alike_in_every_layout() -> None:
    batch, found = batch_of(SHAPES), []
    for layout in ("padded", "prefix"):
        module = TextScalar(scalar_of(make("llama"), copied=False))
        scored = module(replace(batch, content=replace(batch.content, layout=layout)), want=WANT)
        (scored.total.square().sum() + scored.extras["values"].square().sum()).backward()
        found.append([p.grad for p in module.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pad", ["<pad>", "<|im_end|>"])
def test_a_saved_model_scores_alike_in_transformers(tmp_path: Path, pad: str) -> None:
    """Also where the tokenizer pads with what ends answers: transformers takes the last token that
    is no padding for the last one of the answer.
    """
    wing = build((tiny_lm(), tiny_tokenizer(pad=pad, bos=True)), scalar=Scale())
    batch = wing.examples(pair_rows(4), TextOptions(), kind="pairs", seed=0).collate(
        range(4), [0] * 4
    )
    wing.save(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    content = batch.content
    texts = [
        [*content.prompts[owner].tolist(), *completion.tolist()]
        for owner, completion in zip(content.owner, content.completions, strict=True)
    ]
    assert all(ids[-1] == 3 or 3 in ids[-2:] for ids in texts), "answers that were ended"
    padded = tokenizer.pad({"input_ids": texts}, return_tensors="pt")
    with torch.no_grad():
        expected = loaded(**padded).logits.squeeze(-1)
        found = wing.module(batch).total
    assert loaded.config.num_labels == 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (tmp_path / NOTES).is_file()
    assert wing.tokenizer.pad_token == pad, "the caller's tokenizer is as it was"


def test_a_reward_model_goes_on_from_its_folder(tmp_path: Path) -> None:
    """Head and trunk to the last bit; with a LoRA its head is saved with it."""
    tiny_lm().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    batch = batch_of(SHAPES)
    for adapter in (None, LoRA(rank=2)):
        wing = build(tmp_path / "base", scalar=Scale(), adapter=adapter, seed=5)
        move(wing.module)
        before = wing.module(batch).total
        folder = tmp_path / ("lora" if adapter else "whole")
        wing.save(folder)
        again = build(folder, scalar=Scale(), seed=6)
        torch.testing.assert_close(again.module(batch).total, before, rtol=0, atol=0)
        assert again.adapter == ("continued" if adapter else "none")
        head = [n for n, p in wing.policy.named_parameters() if "score" in n and p.requires_grad]
        assert len(head) == 1


def test_a_critic_of_the_policy_begins_at_zero_and_leaves_the_policy_alone() -> None:
    wing, batch = text_wing(adapter=LoRA(rank=2)), batch_of(SHAPES)
    move(wing.module)
    before = wing.module(batch).total
    backend = wing.scalar()
    found = backend.module(batch, want=WANT)
    assert not found.total.any() and not found.extras["values"].any()
    assert backend.layout == "prefix"
    expected = wing.policy.base_model.model.model(torch.tensor([[5, 6]])).last_hidden_state
    trunk = backend.module.model.model(torch.tensor([[5, 6]])).last_hidden_state
    torch.testing.assert_close(trunk, expected, rtol=1e-5, atol=1e-5)
    move(backend.module)
    torch.testing.assert_close(wing.module(batch).total, before, rtol=0, atol=0)
    assert all(p.requires_grad for p in backend.module.parameters())


def test_a_critic_from_a_reward_model_gives_its_scores(tmp_path: Path) -> None:
    reward = build((tiny_lm("llama"), tiny_tokenizer()), scalar=Scale(scale=2.0, offset=-1.0))
    reward.save(tmp_path)
    backend = text_wing().scalar(tmp_path)
    batch = batch_of(SHAPES)
    torch.testing.assert_close(backend.module(batch).total, reward.module(batch).total)
    raw = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    _, last = by_hand(raw, batch.content.prompts[0], batch.content.completions[0])
    torch.testing.assert_close(backend.module(batch).total[0], 2 * last - 1)


def test_what_cannot_score_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no class for sequence classification"):
        build((make("mamba"), tiny_tokenizer()), scalar=Scale())
    tiny_lm().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="another model"):
        text_wing().scalar(tmp_path)
    build((tiny_lm(), tiny_tokenizer()), scalar=Scale(outputs=2, ordinal=True)).save(tmp_path)
    with pytest.raises(ConfigError, match="trained with pairwise=False, ordinal=True"):
        build(tmp_path, scalar=Scale())


def test_ordinal_logits_add_up_to_the_expected_rating() -> None:
    """sum over k of P(rating > k), each a sigmoid of one output."""
    wing = build((tiny_lm(), tiny_tokenizer()), scalar=Scale(outputs=3, ordinal=True))
    found = wing.module(batch_of(SHAPES), want=frozenset({"logits", "values", "token_mask"}))
    logits = found.extras["logits"]
    assert logits.shape == (len(found.total), 3)
    torch.testing.assert_close(found.total, (1 / (1 + (-logits).exp())).sum(-1))
    assert bool((found.extras["values"][found.extras["token_mask"]] > 0).all())
