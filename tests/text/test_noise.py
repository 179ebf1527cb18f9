"""NEFTune: its size, what it is keyed by, and where there is none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from alignkit import SFT, ConfigError, TrainerOptions, build
from alignkit.text.noise import EmbeddingNoise
from tests.builders import loss_and_gradients, text_wing, tiny_lm, tiny_tokenizer
from tests.objectives.test_supervised import conversations, global_batch, objective

ALPHA = 5.0


def embedded(wing: Any, batch: Any, key: tuple[int, int]) -> list[torch.Tensor]:
    """What the first block gets of each row, its own places only."""
    seen: list[torch.Tensor] = []
    hook = wing.policy.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    wing.backend.module(batch, wing.backend.draw(batch, key))
    hook.remove()
    # A row's last token is nobody's input.
    return [seen[0][row, : n - 1].detach() for row, n in enumerate(batch.content.lengths())]


def test_size_of_the_noise() -> None:
    """T = 10, d = 64, alpha = 5: amplitude 0.1976424 and its third root of 3, 0.1141089."""
    draw = EmbeddingNoise(ALPHA, (0, 1), tuple(range(400)))
    noise = torch.stack([draw.row(answer, 10, 64) for answer in range(400)])
    assert noise.abs().max().item() == pytest.approx(0.1976424, rel=1e-4)
    assert noise.std().item() == pytest.approx(0.1141089, rel=5e-3)
    assert abs(noise.mean().item()) < 1e-3


def test_each_row_has_noise_of_its_own_length_and_padding_none() -> None:
    wing = text_wing("llama")
    batch = global_batch(wing).select([0, 1, 2])
    plain = embedded(wing, batch, (0, 1))
    wing.backend.neftune_alpha = ALPHA
    noisy = embedded(wing, batch, (0, 1))
    for place, (before, after) in enumerate(zip(plain, noisy, strict=True)):
        length, width = len(before) + 1, before.shape[1]
        added = after - before
        assert added.abs().max().item() == pytest.approx(ALPHA / (length * width) ** 0.5, rel=0.02)
        wanted = EmbeddingNoise.of(ALPHA, batch, (0, 1)).row(place, length, width)
        torch.testing.assert_close(added, wanted[:-1], rtol=1e-4, atol=1e-6)
    assert len(set(batch.content.lengths())) > 1


@pytest.mark.parametrize("layout", ["varlen", "prefix"])
def test_packed_rows_have_the_noise_of_padded_ones(layout) -> None:
    wing = text_wing("llama")
    wing.backend.neftune_alpha = ALPHA
    batch = global_batch(wing)
    found = []
    for name in ("padded", layout):
        laid = replace(batch, content=replace(batch.content, layout=name))
        found.append(wing.backend.module(laid, wing.backend.draw(laid, (0, 1))).total)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_it_is_keyed_by_seed_step_and_position_alone() -> None:
    """One row alone has the noise that it has in its batch; steps, seeds and rows differ."""
    wing = text_wing("llama")
    wing.backend.neftune_alpha = ALPHA
    batch = global_batch(wing)
    together = embedded(wing, batch.select([4, 5]), (0, 1))
    assert torch.equal(embedded(wing, batch.select([5]), (0, 1))[0], together[1])
    for other in ((0, 2), (1, 1)):
        assert not torch.equal(embedded(wing, batch.select([5]), other)[0], together[1])
    draw = EmbeddingNoise.of(ALPHA, batch, (0, 1))
    assert not torch.equal(draw.row(0, 6, 4), draw.row(1, 6, 4))


def test_micro_batches_change_nothing_and_evaluation_has_none() -> None:
    wing = text_wing("llama")
    batch = global_batch(wing)
    quiet, _ = loss_and_gradients(objective(wing), batch)
    wing.backend.neftune_alpha = ALPHA
    whole, gradients = loss_and_gradients(objective(wing, budget=8), batch)
    split, others = loss_and_gradients(objective(wing, budget=1), batch)
    assert split == pytest.approx(whole, rel=1e-6) and abs(whole - quiet) > 1e-4
    for key, gradient in gradients.items():
        torch.testing.assert_close(others[key], gradient, rtol=1e-4, atol=1e-7)
    made = objective(wing)
    (micro,) = made.micro_batches(batch, 0)
    total, count = made.evaluate(micro)["loss"]
    assert float(total / count) == pytest.approx(quiet, rel=1e-6)


def test_a_model_without_an_embedding_to_hook_is_refused() -> None:
    model = tiny_lm("llama")
    given = {"trainer": TrainerOptions(max_steps=1, batch_size=2)}
    model.get_input_embeddings = lambda: None
    with pytest.raises(ConfigError, match="does not say which module that is"):
        build((model, tiny_tokenizer()), SFT(neftune_alpha=ALPHA), conversations(), **given)


def test_an_embedding_that_is_not_used_is_told() -> None:
    wing = text_wing("llama")
    wing.backend.neftune_alpha = ALPHA
    batch = global_batch(wing)
    wing.policy.get_input_embeddings = lambda: torch.nn.Embedding(2, 2)
    with pytest.raises(ConfigError, match="ran 0 times"):
        wing.backend.module(batch, wing.backend.draw(batch, (0, 1)))
