"""What modifiers ask of the text likelihood beside its total, against float64 loops."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alignkit.batches import Batch
from alignkit.options import TextOptions
from alignkit.text.wing import TextWing
from tests.builders import text_wing, token_rows
from tests.text.test_likelihood import by_loop

WANT = frozenset({"public", "alignment"})


def ranked_batch(wing: TextWing) -> Batch:
    """Two rankings of uneven answers, of K 3 and 2."""
    rows = [
        {
            "prompt": "the sky is",
            "responses": [" blue and grey in the evening", " grey", " a red fox"],
            "ranking": [0, 1, 2],
        },
        {"prompt": "the fox", "responses": [" lives in the forest", " lives"], "ranking": [1, 0]},
    ]
    return wing.examples(rows, TextOptions(), kind="groups", seed=0).collate([0, 1], [0, 0])


@torch.no_grad()
def alignment_by_loop(model: Any, prompt: list[int], completion: list[int]) -> float:
    """Zhou et al. 2024 (2406.11827) Eq. 3, one probability at a time, averaged over tokens."""
    found = []
    for place, token in enumerate(completion):
        context = torch.tensor([prompt + completion[:place]])
        p = model(input_ids=context).logits[0, -1].softmax(-1).tolist()
        found.append(math.log(p[token]) - math.log(sum(one * one for one in p)))
    return sum(found) / len(found)


@pytest.mark.parametrize("kind", ["groups", "pairs"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_public_and_alignment_equal_float64_loops(architecture: str, kind: str) -> None:
    wing = text_wing(architecture)
    batch = ranked_batch(wing)
    if kind == "pairs":
        examples = wing.examples(token_rows(4), TextOptions(), kind="pairs", seed=0)
        batch = examples.collate(range(4), [0] * 4)
    found = wing.backend.module(batch, want=WANT)
    model = copy.deepcopy(wing.policy).double().eval()
    completions = [answer.tolist() for answer in batch.content.completions]
    groups = batch.group.tolist()
    for row, completion in enumerate(completions):
        prompt = batch.content.prompts[groups[row]].tolist()
        shortest = min(
            len(c) for c, group in zip(completions, groups, strict=True) if group == groups[row]
        )
        expected = sum(by_loop(model, prompt, completion)[:shortest])
        assert found.extras["public"][row].item() == pytest.approx(expected, rel=2e-6)
        if len(completion) == shortest:
            assert found.extras["public"][row] == found.total[row]
        aligned = alignment_by_loop(model, prompt, completion)
        assert found.extras["alignment"][row].item() == pytest.approx(aligned, abs=1e-5)


def test_only_public_carries_a_gradient() -> None:
    wing = text_wing()
    found = wing.backend.module(ranked_batch(wing), want=WANT | {"token_logps"})
    assert found.extras["public"].requires_grad and not found.extras["alignment"].requires_grad
    # d public / d token log-prob: 1 for the first tokens, 0 for the rest.
    (gradient,) = torch.autograd.grad(
        found.extras["public"].sum(), found.extras["token_logps"], retain_graph=True
    )
    counts = [int(n) for n in gradient.sum(-1)]
    lengths = [int(n) for n in found.length]
    assert counts == [min(lengths[:3])] * 3 + [min(lengths[3:])] * 2
    assert set(gradient.unique().tolist()) == {0.0, 1.0}


def test_a_group_s_shortest_answer_is_its_own_affair() -> None:
    wing = text_wing()
    batch = ranked_batch(wing)
    together = wing.backend.module(batch, want=WANT).extras
    for group, answers in ((0, [0, 1, 2]), (1, [3, 4])):
        alone = wing.backend.module(batch.select([group]), want=WANT).extras
        for name in WANT:
            torch.testing.assert_close(alone[name], together[name][answers], rtol=1e-5, atol=1e-5)


class Large(TorchDispatchMode):
    """Counts the results with at least `size` elements."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        found = function(*args, **(kwargs or {}))
        self.count += isinstance(found, torch.Tensor) and found.numel() >= self.size
        return found


def test_alignment_makes_no_further_tensor_of_the_logits_size(monkeypatch) -> None:
    monkeypatch.setattr("alignkit.text.head.BLOCK", {"cpu": 1000})
    wing = text_wing()
    batch = ranked_batch(wing)
    mask = wing.backend.module(batch, want=frozenset({"token_mask"})).extras["token_mask"]
    size = int(mask.sum()) * wing.policy.config.vocab_size
    counts, kept = [], []
    for want in (frozenset(), WANT):
        saved: list[int] = []

        def pack(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(tensor.numel())
            return tensor

        with Large(size) as large, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            wing.backend.module(batch, want=want)
        counts.append(large.count)
        kept.append(sum(n >= size for n in saved))
    assert counts[0] == counts[1] > 0 and kept[0] == kept[1]
