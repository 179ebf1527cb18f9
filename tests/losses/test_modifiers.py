"""Modifiers against hand-worked numbers, brute force and the schedule of SDXL."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.losses import LOSSES, PREFERENCE_LOSSES, modifiers
from tests.builders import pair_scores
from tests.losses.examples import DTYPES, group, one_pair


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- WPO ---------------------------------------------------------------------------------------


def test_wpo_weight_of_one_pair() -> None:
    """Without the correction for sampled tokens: means -10/5 and -12/8 nats."""
    weight = modifiers.wpo_weight(vector(-10 / 5), vector(-12 / 8))
    assert weight.item() == pytest.approx(0.0301974, abs=1e-7)
    loss = PREFERENCE_LOSSES["sigmoid"](one_pair(), beta=0.1)
    assert (weight * loss).item() == pytest.approx(0.0187513, abs=1e-7)


def test_wpo_weight_is_at_most_1_and_passes_no_gradient_on() -> None:
    mean = vector(2.0).requires_grad_()
    weight = modifiers.wpo_weight(mean, vector(-0.5))
    assert weight.item() == 1 and not weight.requires_grad
    assert modifiers.wpo_weight(mean, vector(-2.5)).item() == pytest.approx(math.exp(-0.5))


def test_token_alignment_compares_a_token_with_one_drawn_from_the_policy() -> None:
    chances = [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]
    logits = vector(*[math.log(p) for row in chances for p in row]).reshape(2, 3) + 7
    token_logps = logits.log_softmax(-1)[[0, 1], [1, 2]]
    found = modifiers.token_alignment(token_logps, logits)
    wanted = [math.log(0.3 / (0.25 + 0.09 + 0.04)), math.log(0.8 / (0.01 + 0.01 + 0.64))]
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)


def test_wpo_is_refused_where_pairs_are_compared_with_one_another() -> None:
    for name, row in PREFERENCE_LOSSES.items():
        if row.coupled:
            with pytest.raises(ConfigError, match=f"'{name}' does not take weighting='wpo'"):
                modifiers.check_weighting("wpo", row)
        else:
            modifiers.check_weighting("wpo", row)
    with pytest.raises(ConfigError, match=r"Unknown weighting 'wop'.* 'wpo'"):
        modifiers.check_weighting("wop")
    modifiers.check_weighting(None, PREFERENCE_LOSSES["aot"])


# --- LD-DPO ------------------------------------------------------------------------------------


def test_the_surplus_of_the_longer_answer_counts_less() -> None:
    """Lengths 2 and 4: with a = 0.25 the longer answer is -1 - 2 + 0.25 (-3 - 4)."""
    public, total = vector(-1.5, -3), vector(-1.5, -10)
    assert modifiers.without_surplus(total, public, 0.25).tolist() == [-1.5, -4.75]
    assert modifiers.without_surplus(total, public, 0.0).tolist() == [-1.5, -3]
    assert torch.equal(modifiers.without_surplus(total, public, 1.0), total)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="ld_alpha"):
            modifiers.without_surplus(total, public, bad)


# --- the anchor --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_rpo_of_one_pair(dtype) -> None:
    """0.6209570 + 1 * 10 / 5."""
    scores = one_pair(dtype)
    loss = PREFERENCE_LOSSES["sigmoid"](scores, beta=0.1) + 1.0 * modifiers.anchor_loss(scores)
    assert loss.item() == pytest.approx(2.6209570, rel=DTYPES[dtype])


def test_the_anchor_follows_the_label() -> None:
    found = modifiers.anchor_loss(one_pair(p_chosen=0.75)).item()
    assert found == pytest.approx(0.75 * 2 + 0.25 * 12 / 8)
    with pytest.raises(ValueError, match="anchor needs `chosen_length`"):
        modifiers.anchor_loss(pair_scores(1.0, 0.0))


def test_the_anchor_of_a_ranking_is_the_mean_of_its_best_answers() -> None:
    # Log-likelihoods -4, -5.5, -7 of 4 tokens.
    assert modifiers.anchor_loss(group([1.0, -0.5, -2.0], [1, 0, 2])).item() == pytest.approx(
        5.5 / 4
    )
    found = modifiers.anchor_loss(group([1.0, -0.5, -2.0], [0, 0, -1])).item()
    assert found == pytest.approx((4 + 5.5) / 8)


# --- the safeguard -----------------------------------------------------------------------------


def test_the_safeguard_keeps_the_winner_s_progress() -> None:
    """A step against g_w - factor g_l lowers the winner's error by at least mu g_w.g_w."""
    draw = torch.Generator().manual_seed(0)
    winner, loser = torch.randn(2, 200, 6, generator=draw).double()
    loser = loser + 0.8 * winner
    square, product = (winner * winner).sum(1), (winner * loser).sum(1)
    for mu in (0.0, 0.6, 1.0):
        factor = modifiers.safeguard_factor(square, product, mu)
        assert ((factor >= 0) & (factor <= 1)).all()
        progress = square - factor * product
        assert (progress >= mu * square - 1e-9).all()
        # As large as it may be: either the loser counts in full, or the bound is met exactly.
        full = factor == 1
        torch.testing.assert_close(progress[~full], mu * square[~full])
        assert full.any() and (~full).any()


def test_safeguard_by_hand() -> None:
    # (1 - 0.6) * 2 / 4, a product that is small enough, one that is negative, one that is 0.
    found = modifiers.safeguard_factor(vector(2, 2, 2, 2), vector(4, 0.5, -3, 0))
    assert found.tolist() == pytest.approx([0.2, 1, 1, 1])
    with pytest.raises(ConfigError, match="mu"):
        modifiers.safeguard_factor(vector(1), vector(1), 1.5)


def test_damped_changes_the_gradient_alone() -> None:
    x = vector(3.0, -2.0).requires_grad_()
    y = modifiers.damped(x, vector(0.25, 0.0))
    assert torch.equal(y, x)
    (3 * y).sum().backward()
    assert x.grad.tolist() == [0.75, 0]


# --- timesteps ---------------------------------------------------------------------------------

SD = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


def test_elbo_weights_of_the_sdxl_schedule() -> None:
    weights = modifiers.elbo_weights(SD)
    assert [SD[0].item(), SD[499].item(), SD[999].item()] == pytest.approx(
        [0.99915, 0.2776697, 0.0046601], abs=1e-7
    )
    assert weights.sum().item() == pytest.approx(6.527743, abs=1e-6) and weights[0] == 0
    # The exact form beta^2 / (2 sigma^2 alpha (1 - abar)) of Ho et al., posterior variance.
    for t in (1, 10, 500, 999):
        alpha = (SD[t] / SD[t - 1]).item()
        posterior = (1 - SD[t - 1]) / (1 - SD[t]) * (1 - alpha)
        exact = (1 - alpha) ** 2 / (2 * posterior * alpha * (1 - SD[t]))
        assert weights[t].item() == pytest.approx(exact.item(), rel=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", modifiers.TIMESTEP_WEIGHTINGS)
def test_timestep_weights_have_mean_1(kind, prediction_type) -> None:
    weights = modifiers.timestep_weights(kind, SD, prediction_type)
    assert weights.shape == (1000,) and weights.mean().item() == pytest.approx(1)
    assert (weights > 0).all()


def test_timestep_weights_by_hand() -> None:
    assert modifiers.timestep_weights("uniform", SD).tolist() == [1] * 1000
    # snr = 9, 1 and 1/3: min(snr, 5) / snr = 5/9, 1, 1; of the velocity min(snr, 5) / (snr + 1).
    abar = vector(0.9, 0.5, 0.25)
    raw = vector(5 / 9, 1, 1)
    found = modifiers.timestep_weights("min_snr", abar)
    torch.testing.assert_close(found, raw / raw.mean())
    raw = vector(0.5, 0.5, 0.25)
    torch.testing.assert_close(
        modifiers.timestep_weights("min_snr", abar, "v_prediction"), raw / raw.mean()
    )


def test_the_first_ten_elbo_weights_are_held() -> None:
    weights = modifiers.timestep_weights("elbo", SD)
    exact = modifiers.elbo_weights(SD)
    assert (weights[:10] == weights[10]).all()
    torch.testing.assert_close(weights[10:] / weights[10], exact[10:] / exact[10])


def test_a_velocity_s_error_weighs_as_the_noise_s() -> None:
    """err_v = err_eps / abar, so that weight times error is the same function of the noise's."""
    for kind in ("min_snr", "elbo"):
        of_noise = modifiers.timestep_weights(kind, SD)
        of_velocity = modifiers.timestep_weights(kind, SD, "v_prediction")
        ratio = of_velocity / SD / of_noise
        torch.testing.assert_close(ratio, ratio[0].expand(1000))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_elbo_in_nats_is_the_log_density_ratio_of_two_gaussians(prediction_type) -> None:
    """Policy N(.5, 1) and reference N(0, 1) with exact denoisers, at x_0 = .7: .225 nats."""

    def error(mean: float) -> torch.Tensor:
        noise = 1 - SD
        found = (1 - noise) ** 2 + noise * SD * (0.7 - mean) ** 2
        return found if prediction_type == "epsilon" else found / SD

    nats = modifiers.nats_per_error(SD, 1, prediction_type)
    estimate = -(nats * (error(0.5) - error(0.0))).mean().item()
    assert estimate == pytest.approx(0.225, abs=2e-3)
    four = modifiers.nats_per_error(SD, 4, prediction_type)
    torch.testing.assert_close(four, 4 * nats)


def test_unknown_weightings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Unknown timestep_weighting 'minsnr'.* 'min_snr'"):
        modifiers.timestep_weights("minsnr", SD)
    with pytest.raises(ConfigError, match="Unknown prediction_type"):
        modifiers.timestep_weights("elbo", SD, "sample")


def test_modifiers_take_the_names_of_no_loss() -> None:
    assert not {*modifiers.WEIGHTINGS, *modifiers.TIMESTEP_WEIGHTINGS} & set(LOSSES)
