"""Packed rows against padded ones: log-probabilities, totals and gradients, family by family."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from alignkit.batches import Batch
from alignkit.errors import ConfigError
from alignkit.text.attention import IMPLEMENTATION
from alignkit.text.backend import TextBackend
from alignkit.text.content import TextContent
from alignkit.text.flash import SharedPrompt
from alignkit.text.likelihood import TextLikelihood
from alignkit.text.module import repeated_layers
from alignkit.text.packing import lay_out
from alignkit.text.policy import checkpoint_layers
from tests.losses.no_sync import NoSync
from tests.text.models import VOCABULARY, make

FAMILIES = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi", "gpt2", "gpt_neox"),
    *("cohere", "granite", "gptj", "mixtral"),
)
SHAPES = ((9, (4, 1, 7)), (2, (5,)), (1, (3, 3)), (14, (1, 1)))
"""Tokens of prompts and of their answers: K of 3, 1, 2 and 2; the sliding windows hold 5."""
WANT = frozenset({"token_logps", "token_mask", "public", "alignment"})


def batch_of(shapes: Sequence[tuple[int, Sequence[int]]], layout: str = "padded") -> Batch:
    draw = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return draw.integers(0, VOCABULARY, length, dtype=np.int32)

    prompts = tuple(ids(prompt) for prompt, _ in shapes)
    completions = tuple(ids(length) for _, answers in shapes for length in answers)
    owner = tuple(group for group, (_, answers) in enumerate(shapes) for _ in answers)
    return Batch(
        content=TextContent(prompts, completions, owner, layout=layout),
        group=torch.tensor(owner),
        rank=torch.full((len(owner),), -1),
        position=torch.arange(len(prompts)),
        row_id=torch.arange(len(prompts)),
    )


def laid(batch: Batch, layout: str) -> Batch:
    return replace(batch, content=replace(batch.content, layout=layout))


def computed(module: TextLikelihood, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
    """The likelihood, and the gradient of a weighted sum of it."""
    module.zero_grad(set_to_none=True)
    found = module(batch, want=WANT)
    (found.total * torch.linspace(0.5, 1.5, len(found.total))).sum().backward()
    named = module.named_parameters()
    return found, {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_equal(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    (likelihood, gradients), (plain, plain_gradients) = found, expected
    torch.testing.assert_close(likelihood.total, plain.total, rtol=1e-6, atol=0)
    assert torch.equal(likelihood.length, plain.length)
    assert torch.equal(likelihood.extras["token_mask"], plain.extras["token_mask"])
    for name in ("token_logps", "public", "alignment"):
        torch.testing.assert_close(
            likelihood.extras[name], plain.extras[name], rtol=1e-6, atol=1e-5
        )
    assert gradients.keys() == plain_gradients.keys() and gradients
    for name, gradient in plain_gradients.items():
        gap, norm = (gradients[name] - gradient).norm(), gradient.norm()
        assert gap <= 1e-5 * norm + 1e-7, (name, float(gap), float(norm))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_gives_what_padded_rows_give(family) -> None:
    module = TextLikelihood(make(family))
    batch = batch_of(SHAPES)
    expected = computed(module, batch)
    for layout in ("prefix", "varlen"):
        assert_equal(computed(module, laid(batch, layout)), expected)


@pytest.mark.parametrize("layout", ["prefix", "varlen"])
def test_the_attention_of_other_devices_gives_the_same(layout, monkeypatch) -> None:
    """Sequence by sequence through torch's own attention; GPUs take it."""
    module, batch = TextLikelihood(make("llama")), batch_of(SHAPES, layout)
    expected = computed(module, batch)
    module.kernels = ("sequences",)
    monkeypatch.setattr(SharedPrompt, "forward", None)
    assert_equal(computed(module, batch), expected)


def test_a_packed_row_holds_no_padding_and_every_prompt_once() -> None:
    real = sum(prompt + sum(answers) for prompt, answers in SHAPES)
    answers = sum(len(answers) for _, answers in SHAPES)
    content = batch_of(SHAPES).content
    # The last token of an answer predicts nothing.
    assert lay_out(replace(content, layout="prefix")).ids.shape == (1, real - answers)
    again = sum(prompt * (len(answers) - 1) for prompt, answers in SHAPES)
    assert lay_out(replace(content, layout="varlen")).ids.shape == (1, real + again - answers)


@pytest.mark.parametrize("layout", ["padded", "prefix", "varlen"])
def test_tokens_that_are_not_scored_are_context_in_every_layout(layout) -> None:
    module, batch = TextLikelihood(make("llama")), batch_of(SHAPES)
    whole = module(batch, want=WANT)
    draw = np.random.default_rng(1)
    scored = tuple(draw.random(len(ids)) < 0.5 for ids in batch.content.completions)
    assert any(one.any() and not one[-1] for one in scored)
    marked = laid(replace(batch, content=replace(batch.content, scored=scored)), layout)
    found = module(marked, want=WANT)
    counts = torch.zeros_like(whole.extras["token_mask"])
    for row, one in enumerate(scored):
        counts[row, : len(one)] = torch.from_numpy(one)
    assert torch.equal(found.extras["token_mask"], counts)
    expected = torch.where(counts, whole.extras["token_logps"], 0.0)
    torch.testing.assert_close(found.extras["token_logps"], expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.total, expected.sum(-1), rtol=1e-6, atol=1e-5)
    assert torch.equal(found.length, counts.sum(-1).float())


def test_packed_sequences_never_touch() -> None:
    """A token of one group, or of another answer, moves no other answer's numbers."""
    module, batch = TextLikelihood(make("llama")), batch_of(SHAPES, "prefix")
    before = module(batch, want=WANT).extras["token_logps"]
    completions = list(batch.content.completions)
    completions[0] = (completions[0] + 1) % VOCABULARY
    changed = replace(batch.content, completions=tuple(completions))
    after = module(replace(batch, content=changed), want=WANT).extras["token_logps"]
    assert torch.equal(after[1:], before[1:]) and not torch.equal(after[0], before[0])


@pytest.mark.parametrize("layout", ["prefix", "varlen"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_the_host_never_waits_for_the_device(family, layout) -> None:
    module, batch = TextLikelihood(make(family)), batch_of(SHAPES, layout)
    with NoSync():
        module(batch, want=WANT).total.sum().backward()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_blocks_are_recomputed_as_they_were_computed(family) -> None:
    model = make(family)
    module, batch = TextLikelihood(model), batch_of(SHAPES, "prefix")
    expected = computed(module, batch)
    checkpoint_layers(model)
    calls: list[bool] = []
    first = repeated_layers(model)[0]
    inner = next(m for name, m in first.named_modules() if name.endswith(("attn", "attention")))
    inner.register_forward_hook(lambda *_: calls.append(True))
    assert_equal(computed(module, batch), expected)
    assert len(calls) == 2
    assert model.config._attn_implementation != IMPLEMENTATION
    # A padded batch after it is recomputed with the model's own attention.
    assert_equal(computed(module, laid(batch, "padded")), expected)


class Capacity(nn.Module):
    """A layer that serves the first tokens of a row and drops those beyond its capacity."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        served = torch.arange(hidden.shape[1]) < 32
        return self.inner(hidden) * served[:, None]


def crowded() -> Any:
    model = make("llama")
    model.model.layers[0].mlp = Capacity(model.model.layers[0].mlp)
    return model


UNFIT = {
    "bloom": "takes no position_ids",
    "mamba": "takes no position_ids",
    "gpt_oss": r"its attention takes \['s_aux'\]",
    "lfm2": "depends on what else is in the row",
    "capacity": "depends on what else is in the row",
}


@pytest.mark.parametrize("family", UNFIT)
def test_what_cannot_be_packed_is_found_by_trying(family, caplog) -> None:
    module = TextLikelihood(crowded() if family == "capacity" else make(family))
    backend = TextBackend(module)
    with caplog.at_level(logging.WARNING):
        backend.choose("auto")
    assert backend.layout == "padded" and re.search(UNFIT[family], caplog.text)
    for packing in ("prefix", "varlen"):
        with pytest.raises(ConfigError, match=rf"{UNFIT[family]}.*Write packing='bucket'"):
            backend.choose(packing)


def test_the_trial_leaves_no_trace() -> None:
    model = make("gemma2")
    before, drawn = model.config.to_dict(), torch.get_rng_state()
    backend = TextBackend(TextLikelihood(model))
    backend.choose("auto")
    assert backend.layout == "prefix"
    assert model.config.to_dict() == before and torch.equal(torch.get_rng_state(), drawn)
    assert model.config._attn_implementation != IMPLEMENTATION
