"""References: which snapshot is compared with, and what must stay as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from alignkit import DPO, LoRA, TrainerOptions, build
from alignkit.losses import PREFERENCE_LOSSES
from alignkit.objectives.criterion import Criterion
from alignkit.objectives.preference import PreferenceObjective
from alignkit.options import TextOptions
from alignkit.reference import FrozenAdapter, FrozenModel, NoReference, SwitchedAdapter
from alignkit.runtime import Runtime
from alignkit.text.wing import build as build_text
from tests.builders import (
    loss_and_gradients,
    move,
    pair_rows,
    text_wing,
    tiny_lm,
    tiny_tokenizer,
    token_rows,
)

NOTHING: frozenset[str] = frozenset()
FEW = TrainerOptions(max_steps=3, batch_size=4, learning_rate=1e-2, warmup=0)


def make_batch(wing: Any) -> Any:
    examples = wing.examples(token_rows(6), TextOptions(), kind="pairs", seed=0)
    return examples.collate(range(6), [0] * 6)


def reference_of(run: Any) -> Any:
    return run.trainer.objective.reference


def totals(reference: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return reference.log_likelihood(batch, None, NOTHING).total


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2"])
def test_adapter_off_is_the_frozen_copy_bitwise(architecture) -> None:
    wing = text_wing(architecture, LoRA(rank=4))
    batch = make_batch(wing)
    frozen = FrozenModel.copy_of(wing.backend.module)
    off = SwitchedAdapter(wing.backend, wing.adapters_off)
    start = totals(frozen, batch)
    assert torch.equal(totals(off, batch), start)
    move(wing.backend.module)
    assert torch.equal(totals(off, batch), start) and torch.equal(totals(frozen, batch), start)
    with torch.no_grad():
        assert not torch.equal(wing.backend.module(batch).total, start)


@pytest.mark.parametrize(
    ("adapter", "reference", "kind"),
    [
        (LoRA(rank=4), "auto", SwitchedAdapter),
        (LoRA(rank=4), "frozen", FrozenModel),
        (None, "auto", FrozenModel),
    ],
)
def test_training_moves_the_policy_and_never_the_reference(adapter, reference, kind) -> None:
    policy = (tiny_lm("llama"), tiny_tokenizer())
    run = build(policy, DPO(), pair_rows(8), adapter=adapter, reference=reference, trainer=FEW)
    assert type(reference_of(run)) is kind
    batch = make_batch(run.wing)
    start = totals(reference_of(run), batch)
    assert len(list(run.steps())) == 3
    assert torch.equal(totals(reference_of(run), batch), start)
    with torch.no_grad():
        assert not torch.equal(run.wing.backend.module(batch).total, start)


@pytest.mark.parametrize("source", ["folder", "model in hand", "continue_from"])
def test_a_continued_adapter_is_compared_with_its_start_and_not_with_the_base(
    source, tmp_path
) -> None:
    model, tokenizer = tiny_lm("llama"), tiny_tokenizer()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    first = build_text(str(tmp_path / "base"), adapter=LoRA(rank=4))
    move(first.backend.module)
    first.save(tmp_path / "adapter")
    batch = make_batch(first)
    with torch.no_grad():
        at_start = first.backend.module(batch).total
        with first.adapters_off():
            of_base = first.backend.module(batch).total
    policy: Any = {
        "folder": str(tmp_path / "adapter"),
        "model in hand": (first.policy, tokenizer),
        "continue_from": str(tmp_path / "base"),
    }[source]
    adapter = LoRA(continue_from=str(tmp_path / "adapter")) if "/base" in str(policy) else None
    run = build(policy, DPO(), pair_rows(8), adapter=adapter, trainer=FEW)
    assert type(reference_of(run)) is FrozenAdapter
    losses = [record.loss for record in run.steps()]
    assert losses[0] == torch.tensor(math.log(2)).item() and losses[-1] != losses[0]
    assert torch.equal(totals(reference_of(run), batch), at_start)
    assert not torch.allclose(at_start, of_base, atol=1e-3)
    with torch.no_grad():
        assert not torch.equal(run.wing.backend.module(batch).total, at_start)


def test_the_reference_is_the_model_in_hand_and_not_its_name(tmp_path) -> None:
    tiny_lm("llama").save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    move(model)
    run = build((model, tiny_tokenizer()), DPO(), pair_rows(8), trainer=FEW)
    record = next(run.steps())
    assert record.loss == torch.tensor(math.log(2)).item()
    assert record.metrics["rewards/margins"] == 0


def test_another_model_as_reference_gives_its_own_numbers() -> None:
    tokenizer = tiny_tokenizer()
    other = tiny_lm("llama", seed=5)
    policy = (tiny_lm("llama"), tokenizer)
    run = build(policy, DPO(), pair_rows(8), reference=(other, tokenizer), trainer=FEW)
    batch = make_batch(run.wing)
    expected = build_text((tiny_lm("llama", seed=5), tokenizer)).backend.module(batch).total
    assert torch.equal(totals(reference_of(run), batch), expected)
    assert next(run.steps()).loss != torch.tensor(math.log(2)).item()


def test_no_reference_is_zeros() -> None:
    batch = make_batch(text_wing())
    assert torch.equal(totals(NoReference(), batch), torch.zeros(12))


def test_adapters_are_on_again_after_an_exception_with_their_flags() -> None:
    wing = text_wing("llama", LoRA(rank=4))
    move(wing.backend.module)
    batch = make_batch(wing)
    frozen = next(p for n, p in wing.policy.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)  # a flag that a blind switch would set again
    flags = {name: p.requires_grad for name, p in wing.policy.named_parameters()}
    with torch.no_grad():
        before = wing.backend.module(batch).total
        with pytest.raises(KeyError), wing.adapters_off():
            assert not torch.equal(wing.backend.module(batch).total, before)
            raise KeyError
        assert torch.equal(wing.backend.module(batch).total, before)
    assert {name: p.requires_grad for name, p in wing.policy.named_parameters()} == flags


def test_adapters_that_were_off_stay_off() -> None:
    wing = text_wing("llama", LoRA(rank=4))
    move(wing.backend.module)
    batch = make_batch(wing)
    with torch.no_grad(), wing.adapters_off():
        off = wing.backend.module(batch).total
        with wing.adapters_off():
            pass
        assert torch.equal(wing.backend.module(batch).total, off)


def test_a_frozen_adapter_gives_the_policy_back_after_an_exception() -> None:
    wing = text_wing("llama", LoRA(rank=4))
    reference = FrozenAdapter(wing.backend)
    reference.prepare(None)
    move(wing.backend.module)
    trained = {n: p.detach().clone() for n, p in wing.policy.named_parameters()}
    with pytest.raises(AttributeError):
        reference.log_likelihood(None, None, NOTHING)
    assert all(torch.equal(p, trained[n]) for n, p in wing.policy.named_parameters())


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2"])
@pytest.mark.parametrize("kind", ["adapter off", "frozen adapter", "full"])
def test_gradient_checkpointing_changes_no_gradient(architecture, kind) -> None:
    results = []
    for checkpointing in (False, True):
        wing = build_text(
            (
                tiny_lm(architecture, dropout=0.1 if architecture == "gpt2" else 0.0),
                tiny_tokenizer(),
            ),
            adapter=None if kind == "full" else LoRA(rank=4),
            gradient_checkpointing=checkpointing,
        )
        reference: Any = {
            "adapter off": SwitchedAdapter(wing.backend, wing.adapters_off),
            "frozen adapter": FrozenAdapter(wing.backend),
            "full": FrozenModel.copy_of(wing.backend.module),
        }[kind]
        reference.prepare(Runtime())
        move(wing.backend.module)
        objective = PreferenceObjective(
            wing.backend, reference, Criterion.of(PREFERENCE_LOSSES["sigmoid"], beta=0.1), budget=3
        )
        calls = count_blocks(wing)
        results.append((loss_and_gradients(objective, make_batch(wing)), calls[0]))
    ((loss, gradients), plain), ((again, checked), recomputed) = results
    assert again == loss and gradients.keys() == checked.keys()
    assert any(g.norm() > 0 for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(checked[name], gradient, rtol=1e-5, atol=1e-8)
    assert recomputed > plain, "nothing was recomputed"


def count_blocks(wing: Any) -> list[int]:
    """How often the first block's attention runs."""
    from alignkit.text.module import repeated_layers

    calls, block = [0], repeated_layers(wing.policy)[0]
    attention = next(m for n, m in block.named_children() if "att" in n)

    def count(*_: Any) -> None:
        calls[0] += 1

    attention.register_forward_hook(count)
    return calls
