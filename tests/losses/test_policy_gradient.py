"""Policy and value losses per token: goldens, gradients, and what masked places may hold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alignkit.losses.policy_gradient import (
    clipped_surrogate,
    clipped_value_loss,
    entropy,
    reinforce,
)
from tests.losses.no_sync import NoSync

OLD = torch.tensor([[-1.0, -2.0, -0.5, -1.5]], dtype=torch.float64)
NOW = torch.tensor([[-0.7, -2.4, -0.45, -1.5]], dtype=torch.float64)
GAIN = torch.tensor([[1.0, -1.0, -0.5, 2.0]], dtype=torch.float64)
ALL = torch.ones(1, 4, dtype=torch.bool)


def slopes(loss: Tensor, leaf: Tensor) -> list[float]:
    (found,) = torch.autograd.grad(loss.sum(), leaf)
    return found.flatten().tolist()


def test_clipped_surrogate_golden() -> None:
    logps = NOW.clone().requires_grad_()
    losses, measured = clipped_surrogate(logps, OLD, GAIN, ALL, clip_range=0.2)
    assert losses[0].tolist() == pytest.approx([-1.2, 0.8, 0.5256355, -2.0], abs=1e-7)
    assert losses.mean().item() == pytest.approx(-0.4685911, abs=5e-8)
    assert slopes(losses, logps) == pytest.approx([0, 0, 0.5256355, -2.0], abs=1e-7)
    assert measured["clipped"].mean().item() == 0.5
    ratio = measured["ratio"][0].tolist()
    assert ratio == pytest.approx([1.3498588, 0.67032, 1.0512711, 1], abs=1e-6)
    assert measured["k3"].mean().item() == pytest.approx(0.0303625, abs=5e-8)


def test_defect_2_ratio_is_not_1_on_the_first_minibatch() -> None:
    """Defect 2, as far as the loss goes: equal log-likelihoods give a ratio of exactly 1."""
    logps = NOW.float().requires_grad_()
    losses, measured = clipped_surrogate(logps, NOW.float(), GAIN.float(), ALL)
    assert (measured["ratio"] == 1).all() and not measured["clipped"].any()
    assert (measured["k3"] == 0).all()
    plain = reinforce(logps, GAIN.float(), ALL)
    assert slopes(losses, logps) == slopes(plain, logps) == (-GAIN).flatten().tolist()


def test_without_a_clip_it_is_the_importance_weighted_policy_gradient() -> None:
    logps = NOW.clone().requires_grad_()
    losses, _ = clipped_surrogate(logps, OLD, GAIN, ALL, clip_range=math.inf)
    expected = -((NOW - OLD).exp() * GAIN)
    assert losses.flatten().tolist() == pytest.approx(expected.flatten().tolist())
    assert slopes(losses, logps) == pytest.approx(expected.flatten().tolist())


def test_two_sides_of_the_clip() -> None:
    low, high = 0.1, 0.4
    losses, measured = clipped_surrogate(NOW, OLD, GAIN, ALL, clip_range=(low, high))
    assert losses[0].tolist() == pytest.approx([-1.3498588, 0.9, 0.5256355, -2.0], abs=1e-6)
    assert measured["clipped"][0].tolist() == [0, 1, 0, 0]


def test_no_advantage_no_gradient() -> None:
    logps = NOW.clone().requires_grad_()
    losses, _ = clipped_surrogate(logps, OLD, torch.zeros_like(GAIN), ALL)
    assert slopes(losses, logps) == [0.0] * 4


def test_reinforce_and_value_goldens() -> None:
    """Of A2C: log-likelihoods -0.7 and -2.4, returns 1 and 0.2, values 0.5 and 0.9."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    logps, values, returns = (torch.tensor([x]) for x in ([-0.7, -2.4], [0.5, 0.9], [1.0, 0.2]))
    assert reinforce(logps, returns - values, mask).mean().item() == pytest.approx(-0.665)
    losses, measured = clipped_value_loss(values, values, returns, mask, clip_range=None)
    assert losses.mean().item() == pytest.approx(0.185) and not measured["clipped"].any()


def test_clipped_value_golden() -> None:
    values = torch.tensor([[0.5, 0.9, 0.1]], dtype=torch.float64, requires_grad=True)
    old = torch.full((1, 3), 0.4, dtype=torch.float64)
    returns = torch.tensor([[1.0, 0.0, 0.2]], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    losses, measured = clipped_value_loss(values, old, returns, mask, clip_range=0.2)
    assert losses[0].tolist() == pytest.approx([0.125, 0.405, 0.005])
    assert losses.mean().item() == pytest.approx(0.1783333, abs=5e-8)
    assert measured["clipped"][0].tolist() == [0, 0, 0]
    # V moved 0.5 up towards its return of 1: the held one is the worse, and has no gradient.
    far = torch.tensor([[0.9]], dtype=torch.float64, requires_grad=True)
    loss, held = clipped_value_loss(far, old[:, :1], returns[:, :1], mask[:, :1], clip_range=0.2)
    assert loss.item() == pytest.approx(0.5 * 0.4**2) and held["clipped"].item() == 1
    assert slopes(loss, far) == [0.0]


def test_defect_13_masked_positions_leak_into_losses() -> None:
    """Defect 13: not in losses, not in metrics, not in gradients."""
    mask = torch.tensor([[True, False, True, False]])
    clean = clipped_surrogate(NOW, OLD, GAIN, mask)
    for garbage in (float("nan"), float("inf"), 1e30):
        dirty = [torch.where(mask, x, garbage) for x in (NOW, OLD, GAIN)]
        logps = dirty[0].requires_grad_()
        losses, measured = clipped_surrogate(logps, dirty[1], dirty[2], mask)
        assert torch.equal(losses, clean[0])
        assert all(torch.equal(measured[name], clean[1][name]) for name in measured)
        assert slopes(losses, logps)[1::2] == [0.0, 0.0]
        assert slopes(reinforce(logps, dirty[2], mask), logps)[1::2] == [0.0, 0.0]
        value, _ = clipped_value_loss(logps, dirty[1], dirty[2], mask)
        assert value.isfinite().all() and slopes(value, logps)[1::2] == [0.0, 0.0]


def test_far_log_ratios_stay_finite() -> None:
    old = torch.tensor([[-200.0, -0.1]])
    logps = torch.tensor([[-0.1, -200.0]], requires_grad=True)
    gain = torch.tensor([[-1.0, 1.0]])
    losses, measured = clipped_surrogate(logps, old, gain, torch.ones(1, 2, dtype=torch.bool))
    assert losses.isfinite().all() and measured["k3"].isfinite().all()
    assert all(math.isfinite(slope) for slope in slopes(losses, logps))


def test_entropy() -> None:
    p = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]], dtype=torch.float64)
    logits = p.log().requires_grad_()
    found = entropy(logits)
    assert found[0].item() == pytest.approx(-(p[0] * p[0].log()).sum().item())
    assert found[1].item() == 0
    (slope,) = torch.autograd.grad(found.sum(), logits)
    assert (slope[1] == 0).all(), "a token that cannot come has no gradient, and no NaN"
    by_hand = -p[0] * (p[0].log() + found[0].item())
    assert torch.allclose(slope[0], by_hand)


def test_nothing_makes_the_host_wait() -> None:
    logps = NOW.clone().requires_grad_()
    mask = torch.tensor([[True, False, True, True]])
    with NoSync():
        losses, _ = clipped_surrogate(logps, OLD, GAIN, mask)
        value, _ = clipped_value_loss(logps, OLD, GAIN, mask)
        torch.autograd.grad((losses + value + reinforce(logps, GAIN, mask)).sum(), logps)
