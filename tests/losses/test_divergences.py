"""f' of a divergence in place of the log-ratio: values, limits, whole-policy optima, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from alignkit.errors import ConfigError
from alignkit.losses import DIVERGENCES, GROUP_LOSSES, LOSSES, PREFERENCE_LOSSES, PairScores
from alignkit.losses.divergences import CAP, capped, capped_exp, check_divergence, with_divergence
from tests.builders import pair_scores
from tests.losses.examples import DTYPES, group, one_pair

GOLDENS = {
    "reverse_kl": 0.6209570,
    "forward_kl": 0.6311544,
    "js_divergence": 0.6606522,
    "alpha": 0.6276909,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_goldens_of_one_pair(divergence, dtype) -> None:
    scores = with_divergence(one_pair(dtype), divergence, 0.5)
    found = PREFERENCE_LOSSES["sigmoid"](scores, beta=0.1)
    assert found.dtype == dtype
    assert found.item() == pytest.approx(GOLDENS[divergence], rel=DTYPES[dtype])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_f_prime_is_the_papers_and_0_at_the_reference(divergence) -> None:
    f = {
        "reverse_kl": math.log,
        "forward_kl": lambda u: 1 - 1 / u,
        "js_divergence": lambda u: math.log(2 * u / (1 + u)),
        "alpha": lambda u: (1 - u**-0.3) / 0.3,
    }[divergence]
    for x in (-8.0, -1.0, 0.0, 0.4, 9.0):
        found = DIVERGENCES[divergence](torch.tensor(x, dtype=torch.float64), 0.3).item()
        assert found == pytest.approx(f(math.exp(x)), rel=1e-9, abs=1e-12)
    assert DIVERGENCES[divergence](torch.zeros(3), 0.3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_step_0_is_ln_2_and_gradients_equal_differences(divergence) -> None:
    step0 = with_divergence(pair_scores(0.0, 0.0, dtype=torch.float32), divergence)
    assert PREFERENCE_LOSSES["sigmoid"](step0, beta=0.1).item() == pytest.approx(math.log(2))
    w = torch.tensor([-35.0, -3, 0.5, 3]).double().requires_grad_()
    ell = torch.tensor([0.3, -34, 1, 4]).double().requires_grad_()
    zero = torch.zeros(4).double()

    def loss(w: torch.Tensor, ell: torch.Tensor) -> torch.Tensor:
        scores = with_divergence(PairScores(w, ell, zero, zero), divergence)
        return PREFERENCE_LOSSES["sigmoid"](scores, beta=1e-12)

    torch.autograd.gradcheck(loss, [w, ell], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("alpha", "limit"), [(1e-4, "reverse_kl"), (1 - 1e-4, "forward_kl")])
def test_alpha_runs_from_reverse_to_forward_kl(alpha, limit) -> None:
    x = torch.linspace(-2, 2, 9).double()
    found = DIVERGENCES["alpha"](x, alpha)
    torch.testing.assert_close(found, DIVERGENCES[limit](x), rtol=1e-3, atol=1e-3)


def test_the_exponential_goes_on_along_its_tangent() -> None:
    x = torch.tensor([-5.0, 0, CAP, CAP + 2, 1e4]).double().requires_grad_()
    value = capped_exp(x)
    at_cap = math.exp(CAP)
    wanted = [math.exp(-5), 1, at_cap, at_cap * 3, at_cap * (1 + 1e4 - CAP)]
    assert value.tolist() == pytest.approx(wanted, rel=1e-12)
    value.sum().backward()
    assert x.grad.tolist() == pytest.approx([math.exp(-5), 1, *[at_cap] * 3], rel=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_finite_at_large_log_ratios_in_float32(name, divergence) -> None:
    row = PREFERENCE_LOSSES[name]
    if row.no_divergence:
        return
    far = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    other = torch.tensor([-1e4, 1e4, 1e4, 0.0], requires_grad=True)
    one, zero = torch.ones(4), torch.zeros(4)
    optional = {"chosen_length": one, "rejected_length": one, "uniform": zero}
    scores = PairScores(far, other, zero, zero, **optional, score_chosen=one, score_rejected=zero)
    loss = row(with_divergence(scores, divergence), beta=0.1)
    gradients = torch.autograd.grad(loss.sum(), (far, other))
    assert loss.isfinite().all() and all(g.isfinite().all() for g in gradients)


def test_capped_counts_where_the_tangent_stands_in() -> None:
    x = torch.tensor([-31.0, -29.0, 31.0, -61.0])
    assert capped(x, "forward_kl").tolist() == [True, False, False, True]
    assert capped(x, "alpha", 0.5).tolist() == [False, False, False, True]
    assert not capped(x, "reverse_kl").any() and not capped(x, "js_divergence").any()


MU, REWARD, BETA = np.array([0.1, 0.4, 0.3, 0.2]), np.array([1.0, 0, -1, 0.5]), 0.5


def optimum(divergence: str) -> np.ndarray:
    """argmax of E[r] - beta D_f: mu times the inverse of f' at (r - c) / beta, c by the sum."""
    if divergence == "reverse_kl":
        free = MU * np.exp(REWARD / BETA)
        return free / free.sum()
    inverse = {
        "forward_kl": lambda x: 1 / (1 - x),
        "js_divergence": lambda x: np.exp(x) / (2 - np.exp(x)),
        "alpha": lambda x: (1 - 0.5 * x) ** -2.0,
    }[divergence]
    last = {"forward_kl": 1.0, "js_divergence": math.log(2), "alpha": 2.0}[divergence]
    low = REWARD.max() - BETA * last + 1e-9
    c = brentq(lambda c: (MU * inverse((REWARD - c) / BETA)).sum() - 1, low, 60)
    return MU * inverse((REWARD - c) / BETA)


PUBLISHED = {
    "reverse_kl": [0.428808, 0.232131, 0.023562, 0.315499],
    "forward_kl": [0.573841, 0.183970, 0.071869, 0.170319],
    "js_divergence": [0.841976, 0.055046, 0.004993, 0.097985],
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_whole_policies_reach_the_optimum_of_their_divergence(divergence) -> None:
    """Four answers, all pairs, exact preferences: L-BFGS on the logits, from the reference."""
    mu, reward = torch.tensor(MU), torch.tensor(REWARD)
    i, j = torch.tensor([(i, j) for i in range(4) for j in range(4) if i != j]).T
    weight, q = mu[i] * mu[j], torch.sigmoid(reward[i] - reward[j])
    logits = mu.log().clone().requires_grad_()

    def loss() -> torch.Tensor:
        logps = logits.log_softmax(0)
        scores = PairScores(logps[i], logps[j], mu.log()[i], mu.log()[j], p_chosen=q)
        return (
            weight * PREFERENCE_LOSSES["sigmoid"](with_divergence(scores, divergence), beta=BETA)
        ).sum()

    search = torch.optim.LBFGS(
        [logits],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        search.zero_grad()
        value = loss()
        value.backward()
        return value

    search.step(closure)
    found = logits.detach().softmax(0).numpy()
    assert np.abs(found - optimum(divergence)).sum() / 2 < 1e-4
    assert np.abs(torch.autograd.grad(loss(), logits)[0].numpy()).max() < 1e-8
    if divergence in PUBLISHED:
        assert optimum(divergence) == pytest.approx(PUBLISHED[divergence], abs=1e-6)


ALLOWED = {
    "sigmoid", "robust", "hinge", "ipo", "exo_pair", "discopop", "sigmoid_norm", "rdpo", "odpo",
    "aot_unpaired", "beta_dpo", "plackett_luce", "all_pairs", "best_of_k",
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_other_divergences_are_for_differences_of_log_ratios(name) -> None:
    check_divergence("reverse_kl", 0.5, LOSSES[name])
    if name in ALLOWED:
        check_divergence("forward_kl", 0.5, LOSSES[name])
        return
    with pytest.raises(ConfigError, match=f"'{name}' does not take divergence='alpha': .{{20,}}"):
        check_divergence("alpha", 0.5, LOSSES[name])


def test_rankings_take_divergences() -> None:
    """K = 2 is the pair."""
    scores = with_divergence(group([1.0, -0.5], [0, 1]), "forward_kl")
    found = GROUP_LOSSES["plackett_luce"](scores, beta=0.1).item()
    assert found == pytest.approx(GOLDENS["forward_kl"], rel=1e-6)


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="Unknown divergence 'reverse'"):
        check_divergence("reverse", 0.5)
    for bad in (0.0, 1.0, math.nan):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            check_divergence("alpha", bad)
