"""Losses of reward models against hand-worked values, one another, and their optima."""

from __future__ import annotations

import math
from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.losses import PREFERENCE_LOSSES, REWARD_LOSSES, GroupScores, PairScores, RatedScores
from alignkit.losses.reward_model import bradley_terry, k_choose_2, ordinal, regression
from alignkit.options import MARGINS


def pairs(chosen: Any, rejected: Any, **fields: Any) -> PairScores:
    chosen = torch.as_tensor(chosen, dtype=torch.float64).reshape(-1)
    rejected = torch.as_tensor(rejected, dtype=torch.float64).reshape(-1)
    zero = torch.zeros_like(chosen)
    return PairScores(chosen, rejected, zero, zero, **fields)


def ranked(scores: Any, rank: Any = None) -> GroupScores:
    values = torch.as_tensor(scores, dtype=torch.float64).reshape(1, -1)
    order = torch.arange(values.shape[1]) if rank is None else torch.tensor(rank)
    return GroupScores(
        values, torch.zeros_like(values), order[None], torch.ones_like(values, dtype=torch.bool)
    )


def vector(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def loss_of(scores: PairScores, **keywords: Any) -> float:
    row = REWARD_LOSSES["bradley_terry"].rows["pairs"]
    return row(scores, beta=1.0, **keywords).item()


def test_hand_worked_values() -> None:
    assert loss_of(pairs(2, 0.5)) == pytest.approx(0.2014133, abs=1e-7)
    soft = pairs(1, 0, p_chosen=vector(0.7))
    assert loss_of(soft) == pytest.approx(0.6132617, abs=1e-7)
    assert loss_of(pairs(2, 0.5), centering=0.01) == pytest.approx(0.2639133, abs=1e-7)
    examples = {
        "groups": ranked([2, 1, 0, -1]),
        "rated": RatedScores(
            vector(0.7), vector(1.0), logits=torch.tensor([[0.4, -1.1]], dtype=torch.float64)
        ),
    }
    goldens = {
        "bradley_terry": 0.2070381,
        "plackett_luce": 1.1610574,
        "best_of_k": 0.4401897,
        "regression": 0.09,
        "ordinal": 0.4001753,
    }
    assert goldens == {name: row.golden for name, row in REWARD_LOSSES.items()}
    for name, golden in goldens.items():
        kind, row = list(REWARD_LOSSES[name].rows.items())[-1]
        assert row(examples[kind], beta=1.0).item() == pytest.approx(golden, abs=1e-7), name


@pytest.mark.parametrize(
    ("margin", "golden"),
    [(0, 0.2014133), (1 / 3, 0.2710977), (2 / 3, 0.3608848), (1, 0.4740770), (3, 1.7014133)],
)
def test_llama_2s_margin_is_inside_the_sigmoid(margin: float, golden: float) -> None:
    found = loss_of(pairs(2, 0.5, target_margin=vector(margin)))
    assert found == pytest.approx(golden, abs=1e-7)


def test_llama_2s_tables() -> None:
    levels = ("significantly better", "better", "slightly better", "negligibly better")
    assert [MARGINS["small"][one] for one in levels] == [1, 2 / 3, 1 / 3, 0]
    assert [MARGINS["large"][one] for one in levels] == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("p", "m", "optimum"),
    [
        (0.8, 0, 1.3862944),
        (0.8, 1 / 3, 1.6071666),
        (0.8, 1, 2.1539621),
        (0.8, 3, 4.0997121),
        (0.6, 1, 0.7324731),
    ],
)
def test_the_optimum_under_a_margin_is_the_closed_form(p: float, m: float, optimum: float) -> None:
    """d* = ln[(M(2p-1) + sqrt(M^2 (2p-1)^2 + 4p(1-p))) / (2(1-p))], M = e^m: slope 0 there, and
    not beside it."""
    big = math.exp(m)
    root = math.sqrt(big**2 * (2 * p - 1) ** 2 + 4 * p * (1 - p))
    star = math.log((big * (2 * p - 1) + root) / (2 * (1 - p)))
    assert star == pytest.approx(optimum, abs=1e-6)

    def slope(d: float) -> float:
        at = torch.tensor([d], dtype=torch.float64, requires_grad=True)
        zero = torch.zeros_like(at)
        scores = PairScores(at, zero, zero, zero, target_margin=vector(m), p_chosen=vector(p))
        REWARD_LOSSES["bradley_terry"].rows["pairs"](scores, beta=1.0).sum().backward()
        return float(at.grad)

    assert abs(slope(star)) < 1e-9 and slope(star - 0.1) < -1e-3 and slope(star + 0.1) > 1e-3


def test_the_maximum_likelihood_of_a_table_of_wins_has_no_slope() -> None:
    wins = torch.tensor([[0.0, 3, 5], [1, 0, 4], [1, 2, 0]], dtype=torch.float64)
    r = torch.tensor([0.9011665, -0.1246987, -0.7764677], dtype=torch.float64, requires_grad=True)
    i, j = torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")
    zero = torch.zeros(9, dtype=torch.float64)
    losses = bradley_terry(PairScores(r[i.flatten()], r[j.flatten()], zero, zero), beta=1.0)
    (losses * wins.flatten()).sum().backward()
    assert r.grad is not None and float(r.grad.abs().max()) < 1e-5


def test_it_is_the_preference_loss_of_scores() -> None:
    """One function for both: a score is a log-ratio at beta 1."""
    draw = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 20, generator=draw, dtype=torch.float64)
    scores = pairs(chosen, rejected, target_margin=torch.full((20,), 0.3, dtype=torch.float64))
    for smoothing in (0.0, 0.2):
        expected = PREFERENCE_LOSSES["sigmoid"](scores, beta=1.0, label_smoothing=smoothing)
        found = bradley_terry(scores, beta=1.0, label_smoothing=smoothing)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "centering": 0.02}])
def test_k_choose_2_is_the_mean_of_the_pairs(options: dict[str, float]) -> None:
    """Values, and gradients of each score, from K scores instead of K (K - 1)."""
    values = torch.tensor([0.3, 1.9, -0.4, 0.8, 0.1], dtype=torch.float64)
    rank = [1, 0, 3, 1, 2]  # a tie, which is no pair
    one = values.clone().requires_grad_()
    mask = torch.ones(1, 5, dtype=torch.bool)
    scores = GroupScores(one[None], torch.zeros(1, 5), torch.tensor([rank]), mask)
    k_choose_2(scores, beta=1.0, **options).sum().backward()
    other = values.clone().requires_grad_()
    above = [(i, j) for i, j in permutations(range(5), 2) if rank[i] < rank[j]]
    assert len(above) == len(list(combinations(range(5), 2))) - 1
    first, second = (torch.tensor(side) for side in zip(*above, strict=True))
    zero = torch.zeros(len(above), dtype=torch.float64)
    each = bradley_terry(PairScores(other[first], other[second], zero, zero), beta=1.0, **options)
    each.mean().backward()
    found = k_choose_2(scores, beta=1.0, **options)
    torch.testing.assert_close(found, each.mean()[None], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_two_answers_are_a_pair_whatever_the_loss() -> None:
    expected = loss_of(pairs(1.3, -0.2))
    for name in ("bradley_terry", "plackett_luce", "best_of_k"):
        found = REWARD_LOSSES[name].rows["groups"](ranked([1.3, -0.2]), beta=1.0).item()
        assert found == pytest.approx(expected, abs=1e-12)


def test_scores_may_be_shifted_and_slopes_are_opposite() -> None:
    slopes = []
    for shift in (0.0, 7.0):
        chosen = torch.tensor([1.0 + shift], dtype=torch.float64, requires_grad=True)
        rejected = torch.tensor([0.2 + shift], dtype=torch.float64, requires_grad=True)
        zero = torch.zeros(1, dtype=torch.float64)
        bradley_terry(PairScores(chosen, rejected, zero, zero), beta=1.0).sum().backward()
        slopes.append((float(chosen.grad), float(rejected.grad)))
    expected = -1 / (1 + math.exp(0.8))
    for one, other in slopes:
        assert one == pytest.approx(expected, rel=1e-9) and other == pytest.approx(-expected)


def test_regression_values_and_optimum() -> None:
    rated = RatedScores(vector(0.7), vector(1.0))
    assert regression(rated, beta=1.0).item() == pytest.approx(0.09)
    assert regression(rated, beta=1.0, scale=0.5).item() == pytest.approx(0.36)
    far = RatedScores(vector(3.0), vector(0.0))  # Huber: 2 (|x| - 1/2), twice the usual one half
    assert regression(far, beta=1.0, huber=1.0).item() == pytest.approx(5.0)
    ratings = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    constant = torch.full((3,), 2.0, dtype=torch.float64, requires_grad=True)
    regression(RatedScores(constant, ratings), beta=1.0).sum().backward()
    assert float(constant.grad.sum()) == pytest.approx(0, abs=1e-12), "the mean rating"


def test_regression_per_token_is_the_mean_over_states() -> None:
    values = torch.tensor([[1.0, 3.0, 99.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    rated = RatedScores(vector(2.0), vector(1.0), values=values, mask=mask)
    assert regression(rated, beta=1.0).item() == pytest.approx((0 + 4 + 1) / 3)


def test_ordinal_is_the_cross_entropy_of_thresholds() -> None:
    """Rating 1 of 0..2: above 0 and not above 1."""
    logits = torch.tensor([[0.4, -1.1]], dtype=torch.float64)
    found = ordinal(RatedScores(vector(0.0), vector(1.0), logits=logits), beta=1.0).item()
    above, below = math.log(1 + math.exp(-0.4)), math.log(1 + math.exp(-1.1))
    assert found == pytest.approx((above + below) / 2, rel=1e-12)


@pytest.mark.parametrize("options", [{"label_smoothing": 0.6}, {"centering": -0.1}])
def test_ranges(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        bradley_terry(pairs(1, 0), beta=1.0, **options)
    with pytest.raises(ConfigError, match=next(iter(options))):
        k_choose_2(ranked([1, 0]), beta=1.0, **options)
