"""What losses are to one another, and where their formulas need care."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from alignkit.losses import PREFERENCE_LOSSES, UNPAIRED_LOSSES, UnpairedScores
from tests.builders import pair_scores
from tests.losses.examples import answers, batch3, image_pair, one_pair

W, ELL = torch.linspace(-20, 20, 9), torch.linspace(5, -9, 9)


def singles(liked: bool) -> UnpairedScores:
    """The chosen answers as liked ones, or the rejected ones as disliked."""
    ratio = (W if liked else ELL).double()
    return UnpairedScores(ratio, 0 * ratio, torch.full((9,), liked), kl=0 * ratio)


@pytest.mark.parametrize(
    ("pair", "single"),
    [("nca_pair", "nca"), ("apo_zero", "apo_zero_unpaired"), ("apo_zero", "kto")],
)
def test_a_pair_is_a_liked_and_a_disliked_answer(pair, single) -> None:
    found = PREFERENCE_LOSSES[pair](pair_scores(W, ELL), beta=0.3)
    row = UNPAIRED_LOSSES[single]
    apart = row(singles(True), beta=0.3) + row(singles(False), beta=0.3)
    torch.testing.assert_close(apart, found, rtol=1e-9, atol=1e-12)


def test_bco_on_pairs_is_bco_with_its_shift_given() -> None:
    # Running mean rewards 0.5 and 0.1 of disliked and liked answers: the shift is 0.3.
    state = {"reward.sum": torch.tensor([0.5, 0.1]), "reward.mass": torch.ones(2)}
    row = UNPAIRED_LOSSES["bco"]
    apart = sum(row(singles(liked), beta=0.3, state=state) for liked in (True, False))
    found = PREFERENCE_LOSSES["bco_pair"](pair_scores(W, ELL), beta=0.3, shift=0.3)
    torch.testing.assert_close(apart, found, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_sppo_has_the_gradient_of_sppo_hard_and_is_0_at_its_minimum(q) -> None:
    def slopes(name: str) -> torch.Tensor:
        w, ell = W.double().requires_grad_(), ELL.double().requires_grad_()
        zero = torch.zeros(9).double()
        scores = replace(pair_scores(W, ELL), policy_chosen=w, policy_rejected=ell)
        scores = replace(scores, p_chosen=zero + q)
        PREFERENCE_LOSSES[name](scores, beta=0.4).sum().backward()
        return torch.stack([w.grad, ell.grad])

    torch.testing.assert_close(slopes("sppo"), slopes("sppo_hard"), rtol=1e-9, atol=1e-9)
    best = pair_scores((q - 0.5) / 0.4, (0.5 - q) / 0.4, p_chosen=q)
    assert PREFERENCE_LOSSES["sppo"](best, beta=0.4).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "beta_dpo"])
def test_a_coupled_loss_of_one_pair_is_dpo(name) -> None:
    scores = one_pair()
    dpo = PREFERENCE_LOSSES["sigmoid"](scores, beta=0.1)
    assert torch.equal(PREFERENCE_LOSSES[name](scores, beta=0.1), dpo)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_is_the_cheapest_coupling(name) -> None:
    """No pairing of the two samples costs less: all 3! of them, and with weights 1, 2, 0."""
    from itertools import permutations

    scores = batch3()
    sides = {
        "aot": (
            scores.policy_chosen - scores.policy_rejected,
            scores.reference_chosen - scores.reference_rejected,
        ),
        "aot_unpaired": (scores.chosen, scores.rejected),
    }
    x, y = (0.1 * side for side in sides[name])
    costs = [torch.nn.functional.softplus(y[list(p)] - x).sum() for p in permutations(range(3))]
    found = PREFERENCE_LOSSES[name](scores, beta=0.1).sum()
    assert found.item() == pytest.approx(min(costs).item(), rel=1e-12)


def test_aot_with_fractional_weights_by_hand() -> None:
    """Weights 1 and 3 of W = [3, 0] against L = [-1, 1.5]: quantiles split at 1/4 and 3/4.

    Sorted: W = 0 on [0, 3], 3 on [3, 4]; L = -1 on [0, 1], 1.5 on [1, 4].
    """
    scores = pair_scores([3.0, 0.0], [-1.0, 1.5], weight=[1.0, 3.0])
    found = PREFERENCE_LOSSES["aot_unpaired"](scores, beta=1.0)

    def cost(x: float) -> float:
        return math.log1p(math.exp(-x))

    assert found.tolist() == pytest.approx([cost(1.5), (cost(1) + 2 * cost(-1.5)) / 3], rel=1e-9)


def test_bco_is_unmoved_by_what_all_rewards_gain() -> None:
    ratios, liked = [3.0, 0, -3, -1, 1.5, 1.5], [True] * 3 + [False] * 3
    plain = UNPAIRED_LOSSES["bco"](answers(ratios, liked), beta=0.1)
    moved = UNPAIRED_LOSSES["bco"](answers([r + 7 for r in ratios], liked), beta=0.1)
    torch.testing.assert_close(moved, plain)


def test_bco_s_threshold_runs_and_waits_for_a_class_that_is_absent() -> None:
    row = UNPAIRED_LOSSES["bco"]
    state = row.next_state(answers([2.0, 4.0], [True, True]), {}, beta=0.5)
    # Only liked answers so far: the threshold is their mean reward, 1.5.
    loss = row(answers([5.0], [True]), beta=0.5, state=state).item()
    assert loss == pytest.approx(math.log1p(math.exp(1.5 - 2.5)))
    state = row.next_state(answers([1.0, -2.0], [True, False]), state, beta=0.5)
    # Liked: (0.09 * 1.5 + 0.1 * 0.5) / 0.19; disliked: -1, its first value.
    shift = ((0.135 + 0.05) / 0.19 - 1) / 2
    loss = row(answers([5.0], [False]), beta=0.5, state=state).item()
    assert loss == pytest.approx(math.log1p(math.exp(2.5 - shift)), rel=1e-6)
    again = row.next_state(answers([9.0], [True]), state, beta=0.5)
    assert again["reward.sum"][0] == state["reward.sum"][0]
    assert again["reward.mass"][0] == state["reward.mass"][0]


def test_odpo_asks_nothing_of_scores_that_do_not_differ() -> None:
    for better in (1.0, 0.5):
        scores = one_pair(score_chosen=better, score_rejected=1.0)
        found = PREFERENCE_LOSSES["odpo"](scores, beta=0.1).item()
        assert found == pytest.approx(math.log1p(1e-6 * math.exp(-0.15)), rel=1e-6)


def test_orpo_stays_finite_where_the_model_is_certain() -> None:
    scores = pair_scores(
        [0.0, -1e-9, -5.0],
        [-3.0, 0.0, -1e-12],
        dtype=torch.float32,
        chosen_length=1.0,
        rejected_length=1.0,
    )
    scores.policy_chosen.requires_grad_()
    scores.policy_rejected.requires_grad_()
    loss = PREFERENCE_LOSSES["orpo"](scores, beta=1.0)
    slopes = torch.autograd.grad(loss.sum(), [scores.policy_chosen, scores.policy_rejected])
    assert loss.isfinite().all() and all(g.isfinite().all() for g in slopes)


def test_orpo_s_odds_are_those_of_mean_token_probabilities() -> None:
    """Means ln 0.5 and ln 0.2: odds 1 and 1/4, ratio 4, so L(ln 4) = ln(5/4)."""
    scores = pair_scores(
        3 * math.log(0.5), 2 * math.log(0.2), chosen_length=3.0, rejected_length=2.0
    )
    found = PREFERENCE_LOSSES["orpo"](scores, beta=1.0, lam=1.0).item()
    assert found == pytest.approx(math.log(2) + math.log(5 / 4), rel=1e-9)


def test_mapo_s_odds_by_hand_and_at_no_error() -> None:
    """f(x) = x/2 / (e^(x/2) - 1): 0.9752083 and 0.9749625 on the example, 1 at 0."""
    plain = PREFERENCE_LOSSES["mapo"](image_pair(), beta=0.1)
    term = math.log1p(math.exp(-1000 * (0.9752083 - 0.9749625)))
    assert plain.item() == pytest.approx(0.1 + 0.1 * term, abs=1e-5)
    none = pair_scores([0.0, -1e-8], [-0.5, -0.5])
    found = PREFERENCE_LOSSES["mapo"](none, beta=0.1, timesteps=1.0)
    wanted = 0.1 * math.log1p(math.exp(-(1 - 0.5 / math.expm1(0.5))))
    assert found.tolist() == pytest.approx([wanted, wanted], rel=1e-6)


def test_mapo_s_odds_are_exact_where_float32_would_swallow_them() -> None:
    """Across the change from the series to the quotient, and its gradient at small errors."""
    for error in (1e-6, 1e-3, 0.19999, 0.20001, 0.3):
        x = 0.5 * error
        slope = 0.5 * (1 / math.expm1(x) - x * math.exp(x) / math.expm1(x) ** 2)
        single, double = (
            pair_scores(-error / 2, -error / 2 - 5e-5, dtype=d)
            for d in (torch.float32, torch.float64)
        )
        double.policy_chosen.requires_grad_()
        loss = PREFERENCE_LOSSES["mapo"](double, beta=1.0)
        loss.backward()
        found = PREFERENCE_LOSSES["mapo"](single, beta=1.0)
        assert found.item() == pytest.approx(loss.item(), rel=5e-5)
        logit = 1000 * (x / math.expm1(x) - (x + 5e-5) / math.expm1(x + 5e-5))
        if error > 1e-5:  # below, the double-precision quotients of this test fail first
            wanted = -2 * (1 - 1000 * slope / (1 + math.exp(logit)))
            assert double.policy_chosen.grad.item() == pytest.approx(wanted, rel=1e-6)


def test_simpo_s_gamma_is_a_target_margin() -> None:
    plain = PREFERENCE_LOSSES["simpo"](one_pair(), beta=2.0, gamma_ratio=0.5)
    scores = one_pair(target_margin=1.0)
    torch.testing.assert_close(PREFERENCE_LOSSES["simpo"](scores, beta=2.0, gamma_ratio=0.0), plain)


def test_certain_scores_are_certain_far_out() -> None:
    """A pair that is decided by 1e4 nats costs nothing, and the wrong way round its margin."""
    far = pair_scores([1e4, -1e4], [-1e4, 1e4], dtype=torch.float32)
    assert PREFERENCE_LOSSES["sigmoid"](far, beta=0.1).tolist() == [0, pytest.approx(2e3)]
    assert PREFERENCE_LOSSES["apo_zero"](far, beta=0.1).tolist() == [0, 2]
