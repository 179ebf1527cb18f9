"""The text log-likelihood against a float64 loop, and what must not change it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from alignkit.batches import Batch
from alignkit.options import TextOptions
from alignkit.text.backend import TextBackend
from alignkit.text.module import repeated_layers
from tests.builders import text_wing, token_rows

ROWS = [
    *token_rows(6),
    # Token 0 is the pad id, 1 bos, 3 eos: all of them may stand anywhere.
    {"prompt_ids": [1, 0, 9, 3], "chosen_ids": [8, 0, 5, 0, 3], "rejected_ids": [0, 0, 3]},
]


def make_batch(rows: list[dict[str, Any]] = ROWS) -> Batch:
    options = TextOptions(identical_pairs="keep")
    examples = text_wing().examples(rows, options, kind="pairs", seed=0)
    return examples.collate(range(len(rows)), [0] * len(rows))


def answers(rows: list[dict[str, Any]] = ROWS) -> list[tuple[list[int], list[int]]]:
    sides = ("chosen_ids", "rejected_ids")
    return [(row["prompt_ids"], row[side]) for row in rows for side in sides]


@torch.no_grad()
def by_loop(model: Any, prompt: list[int], completion: list[int]) -> list[float]:
    """Log-probabilities of a completion's tokens, one unpadded row and one position at a time."""
    found = []
    for place, token in enumerate(completion):
        context = torch.tensor([prompt + completion[:place]])
        logits = model(input_ids=context).logits[0, -1]
        found.append(torch.log_softmax(logits, dim=-1)[token].item())
    return found


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2"])
def test_equals_a_float64_loop_over_positions(architecture) -> None:
    wing = text_wing(architecture, dropout=0.1 if architecture == "gpt2" else 0.0)
    model = copy.deepcopy(wing.policy).double().eval()
    found = wing.backend.module(make_batch(), want=frozenset({"token_logps", "token_mask"}))
    per_token, mask = found.extras["token_logps"], found.extras["token_mask"]
    for row, (prompt, completion) in enumerate(answers()):
        expected = by_loop(model, prompt, completion)
        assert found.total[row].item() == pytest.approx(sum(expected), rel=2e-6)
        assert found.length[row] == len(completion)
        assert per_token[row][mask[row]].tolist() == pytest.approx(expected, rel=1e-5)
        assert (per_token[row][~mask[row]] == 0).all()
    assert found.total.dtype == torch.float32 and per_token.shape == mask.shape


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2"])
def test_a_longer_neighbour_changes_nothing(architecture) -> None:
    module = text_wing(architecture).backend.module
    alone = module(make_batch(ROWS[:2])).total
    long = {"prompt_ids": [5] * 30, "chosen_ids": [6] * 40, "rejected_ids": [7] * 9}
    beside = module(make_batch([*ROWS[:2], long])).total[:4]
    torch.testing.assert_close(beside, alone, rtol=2e-6, atol=0)


@pytest.mark.parametrize("options", [{"pad": "<|im_end|>"}, {"pad": "<|im_start|>"}, {"bos": True}])
@pytest.mark.parametrize("chat", [True, False])
def test_masks_do_not_ask_for_the_pad_id(options, chat) -> None:
    """Padding as eos or as a token of the text: completions keep all their tokens and their eos."""
    rows = (
        [
            {
                "prompt": [{"role": "user", "content": "the sky"}],
                "chosen": [{"role": "assistant", "content": "is blue"}],
                "rejected": [{"role": "assistant", "content": "is a red fox in the forest"}],
            }
        ]
        if chat
        else [{"prompt": "the sky", "chosen": " is blue", "rejected": " is a red fox, they say"}]
    )
    wing = text_wing(**options)
    batch = wing.examples(rows, TextOptions(), kind="pairs", seed=0).collate([0], [0])
    found = wing.backend.module(batch)
    model = copy.deepcopy(wing.policy).double().eval()
    eos = wing.tokenizer.eos_token_id
    for row, completion in enumerate(batch.content.completions):
        assert completion.tolist().count(eos) == 1
        expected = by_loop(model, batch.content.prompts[0].tolist(), completion.tolist())
        assert found.total[row].item() == pytest.approx(sum(expected), rel=2e-6)


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_logits_are_made_where_a_completion_token_is_predicted_and_nowhere_else(
    architecture,
) -> None:
    wing, seen = text_wing(architecture), []

    def keep(module: Any, inputs: Any, logits: torch.Tensor) -> None:
        logits.retain_grad()
        seen.append(logits)

    wing.policy.get_output_embeddings().register_forward_hook(keep)
    wing.backend.module(make_batch()).total.sum().backward()
    (logits,) = seen
    tokens = torch.tensor([token for _, completion in answers() for token in completion])
    assert logits.shape == (1, len(tokens), wing.policy.config.vocab_size)
    # d / d logits = onehot - softmax
    expected = nn.functional.one_hot(tokens, logits.shape[-1]) - logits[0].detach().softmax(-1)
    torch.testing.assert_close(logits.grad[0], expected, rtol=1e-4, atol=1e-6)


def test_padding_trains_no_embedding() -> None:
    wing = text_wing("llama")
    wing.backend.module(make_batch(token_rows(6))).total.sum().backward()  # no token below 4
    gradient = wing.policy.get_input_embeddings().weight.grad
    assert (gradient[:4] == 0).all() and (gradient[4:] != 0).any()


def test_dropout_is_off_whatever_the_config_and_mode_say() -> None:
    wing = text_wing("gpt2", dropout=0.5)
    first, second = (wing.backend.module(make_batch()).total for _ in range(2))
    assert torch.equal(first, second) and not wing.policy.training


def test_blocks_are_the_layers_and_not_the_experts_inside_them() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.Linear(4, 4)
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))

    model = nn.Sequential(nn.Embedding(9, 4), nn.ModuleList(Layer() for _ in range(2)))
    assert [type(block) for block in repeated_layers(model)] == [Layer, Layer]
    assert repeated_layers(nn.Linear(2, 2)) == []


def test_an_unknown_extra_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no extra \['values'\]"):
        text_wing().backend.module(make_batch(), want=frozenset({"values"}))


def test_auto_micro_batches_hold_every_group_once_within_the_budget(monkeypatch) -> None:
    monkeypatch.setattr("alignkit.text.backend.AUTO_TOKENS", 60)
    batch = make_batch(token_rows(12))
    pieces = TextBackend(text_wing().backend.module).split(batch, "auto")
    assert sorted(row for piece in pieces for row in piece.row_id.tolist()) == list(range(12))
    assert len(pieces) > 1
    for piece in pieces:
        padded = piece.num_answers * max(piece.content.lengths())
        assert padded <= 60 or piece.num_groups == 1


def test_tokens_that_are_not_scored_are_context_and_no_more() -> None:
    """The same row, of whose answers some tokens do not count: their log-probabilities are left
    out, and those of the others stay as they were.
    """
    batch, module = make_batch(), text_wing().backend.module
    want = frozenset({"token_logps", "token_mask"})
    whole = module(batch, want=want)
    draw = np.random.default_rng(0)
    scored = tuple(draw.random(len(ids)) < 0.6 for ids in batch.content.completions)
    marked = replace(batch, content=replace(batch.content, scored=scored))
    found = module(marked, want=want)
    counts = torch.zeros_like(whole.extras["token_mask"])
    for row, one in enumerate(scored):
        counts[row][whole.extras["token_mask"][row]] = torch.from_numpy(one)
    assert 0 < counts.sum() < whole.extras["token_mask"].sum()
    assert torch.equal(found.extras["token_mask"], counts)
    assert torch.equal(found.extras["token_logps"], whole.extras["token_logps"] * counts)
    assert torch.equal(found.length, counts.sum(-1).float())
    torch.testing.assert_close(found.total, found.extras["token_logps"].sum(-1))
    # The marks go with their answers, wherever a batch is cut or crossed.
    part = module(marked.select([3, 1]), want=want)
    torch.testing.assert_close(part.length, found.length[[6, 7, 2, 3]])
    torch.testing.assert_close(part.total, found.total[[6, 7, 2, 3]])
    crossed = marked.content.recombine([0, 1], [5, 2])
    assert crossed.scored is not None
    assert all(map(np.array_equal, crossed.scored, (scored[5], scored[2])))
