"""The language-model head: where it runs, in one piece or in several, and whose it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from alignkit.text.head import TokenLogps
from alignkit.text.likelihood import TextLikelihood
from tests.text.models import make
from tests.text.test_packing import SHAPES, assert_equal, batch_of, computed

HEADS = ("llama", "qwen2", "gemma2", "cohere", "granite", "phi", "gptj", "gpt2")
"""Weights of its own, tied, soft-capped, scaled by a product or a quotient, with a bias (two)."""


class Wide(nn.Module):
    """A model whose forward does something between decoder and head, as MiniCPM's does."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden / 3)


@pytest.fixture
def chunks(monkeypatch) -> Iterator[list[int]]:
    """Logits of five positions at a time; the rows that heads see are told."""
    seen: list[int] = []
    monkeypatch.setattr("alignkit.text.head.LOGITS", 1000)
    monkeypatch.setattr("alignkit.text.head.CHUNK", {"cpu": 5 * 96})
    yield seen


def tell(model: Any, seen: list[int]) -> None:
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, logits: seen.append(logits.shape[1])
    )


@pytest.mark.parametrize("layout", ["padded", "prefix"])
@pytest.mark.parametrize("family", HEADS)
def test_in_chunks_it_is_what_it_is_in_one_piece(family, layout, request) -> None:
    module, batch = TextLikelihood(make(family)), batch_of(SHAPES, layout)
    assert module.head.splits
    expected = computed(module, batch)
    seen = request.getfixturevalue("chunks")
    tell(module.model, seen)
    found = computed(module, batch)
    assert_equal(found, expected)
    num = sum(len(answer) for answer in batch.content.completions)
    forward = [5] * (num // 5) + [num % 5] * (num % 5 > 0)
    # Once forwards, and once more for each chunk in backward.
    assert seen[: len(forward)] == forward and sorted(seen) == sorted(2 * forward)


def test_without_gradients_chunks_are_the_same_and_bits_too(chunks) -> None:
    module, batch = TextLikelihood(make("llama")), batch_of(SHAPES, "prefix")
    with torch.no_grad():
        without = module(batch).total
    assert torch.equal(without, module(batch).total.detach())


def test_an_adapter_on_the_head_is_trained_through_chunks(request) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(make("llama"), config)
    module, batch = TextLikelihood(model), batch_of(SHAPES, "prefix")
    expected = computed(module, batch)
    request.getfixturevalue("chunks")
    assert_equal(computed(module, batch), expected)
    assert any("lm_head" in name for name in expected[1])


def test_what_the_model_does_to_hidden_states_before_its_head_is_its_own() -> None:
    model = make("llama")
    plain = TextLikelihood(model)(batch_of(SHAPES, "prefix")).total
    model.lm_head = Wide(model.lm_head)
    scaled = TextLikelihood(model)
    assert scaled.head.splits
    found = scaled(batch_of(SHAPES, "prefix")).total
    assert not torch.allclose(found, plain)
    torch.testing.assert_close(found, scaled(batch_of(SHAPES)).total, rtol=1e-6, atol=0)


class Mixed(type(make("llama"))):  # type: ignore[misc]
    """A forward that is more than decoder and head."""

    def forward(self, input_ids: Tensor, logits_to_keep: Any = 0, **more: Any) -> Any:
        found = super().forward(input_ids, logits_to_keep=logits_to_keep, **more)
        kept = input_ids[:, logits_to_keep] if isinstance(logits_to_keep, Tensor) else input_ids
        found.logits = found.logits + 0.01 * kept[..., None] * torch.arange(96)
        return found


def test_a_model_that_is_more_than_decoder_and_head_makes_its_logits_itself() -> None:
    model = make("llama")
    model.__class__ = Mixed
    module = TextLikelihood(model)
    assert not module.head.splits
    assert_equal(computed(module, batch_of(SHAPES, "prefix")), computed(module, batch_of(SHAPES)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_log_probabilities_and_their_gradient_are_those_of_log_softmax(dtype, monkeypatch) -> None:
    monkeypatch.setattr("alignkit.text.head.BLOCK", {"cpu": 120})
    draw = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(9, 50, generator=draw)).to(dtype).requires_grad_()
    targets = torch.randint(0, 50, (9,), generator=draw)
    weights = torch.randn(9, generator=draw)
    exact = logits.detach().double().requires_grad_()
    expected = exact.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    found = TokenLogps.apply(logits, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    near = {"rtol": 1e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), exact.grad, **near)
