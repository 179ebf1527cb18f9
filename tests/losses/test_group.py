"""Losses of rankings against hand-worked values and enumeration."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from alignkit.losses import GROUP_LOSSES, PREFERENCE_LOSSES, GroupScores
from tests.builders import pair_scores
from tests.losses.examples import group

RANKED = [2.0, 1.0, 0.0, -1.0]


def test_plackett_luce_probabilities_of_all_rankings_sum_to_one() -> None:
    total = 0.0
    for order in permutations(range(4)):
        total += math.exp(-GROUP_LOSSES["plackett_luce"](group(RANKED, [*order]), beta=0.7).item())
    assert total == pytest.approx(1, rel=1e-12)


def test_a_tied_block_is_one_choice() -> None:
    """{0, 1} tied above {2}: the first pick comes from the block."""
    found = GROUP_LOSSES["plackett_luce"](group([1.0, -0.5, 2.0], [0, 0, 1]), beta=1.0).item()
    first, all_of_them = math.exp(1) + math.exp(-0.5), math.exp(1) + math.exp(-0.5) + math.exp(2)
    assert found == pytest.approx(-math.log(first / all_of_them), rel=1e-12)


def test_all_pairs_leaves_tied_pairs_out_and_best_of_k_takes_the_best_as_one_choice() -> None:
    scores = group([1.0, -0.5, 2.0], [0, 0, 1])
    found = GROUP_LOSSES["all_pairs"](scores, beta=1.0).item()
    assert found == pytest.approx((math.log1p(math.exp(1)) + math.log1p(math.exp(2.5))) / 2)
    found = GROUP_LOSSES["best_of_k"](scores, beta=1.0).item()
    first = math.exp(1) + math.exp(-0.5)
    assert found == pytest.approx(math.log((first + math.exp(2)) / first))


@pytest.mark.parametrize("name", GROUP_LOSSES)
@pytest.mark.parametrize("rank", [[0, 0, 0], [-1, -1, -1], [2, 2, 2]])
def test_a_group_without_any_decided_pair_teaches_nothing(name, rank) -> None:
    scores = group([1.0, -0.5, 2.0], rank)
    scores.policy.requires_grad_()
    loss = GROUP_LOSSES[name](scores, beta=1.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert scores.policy.grad.abs().max() < 1e-12


def test_unranked_answers_are_below_all_ranked_ones_and_end_the_sum() -> None:
    found = GROUP_LOSSES["plackett_luce"](group(RANKED, [0, -1, 1, -1]), beta=1.0).item()
    e = [math.exp(value) for value in RANKED]
    expected = -math.log(e[0] / sum(e)) - math.log(e[2] / (e[1] + e[2] + e[3]))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_two_answers_are_dpo(name) -> None:
    w, ell = torch.linspace(-20, 20, 9), torch.linspace(5, -9, 9)
    ratio = torch.stack([w, ell], 1).double()
    rank = torch.tensor([0, 1]).expand(9, 2)
    scores = GroupScores(ratio, torch.zeros_like(ratio), rank, torch.ones(9, 2).bool())
    dpo = PREFERENCE_LOSSES["sigmoid"](pair_scores(w, ell), beta=0.3)
    found = GROUP_LOSSES[name](scores, beta=0.3)
    torch.testing.assert_close(found, dpo, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_absent_answers_are_as_if_they_were_not(name) -> None:
    full = GROUP_LOSSES[name](group([0.3, -1.0, 0.7], [1, 0, 2]), beta=0.5)
    padded = GroupScores(
        torch.tensor([[0.3, 9.0, -1.0, 0.7, -9.0]], dtype=torch.float64),
        torch.zeros(1, 5).double(),
        torch.tensor([[1, 0, 0, 2, -1]]),
        torch.tensor([[True, False, True, True, False]]),
    )
    torch.testing.assert_close(GROUP_LOSSES[name](padded, beta=0.5), full, rtol=1e-12, atol=1e-12)
