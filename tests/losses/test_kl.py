"""KL estimates: what they are worth in the mean, and which way their gradients go.

Exact sums over the answers of a small world stand for samples, so nothing is left to chance.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.losses.kl import KL_ESTIMATES, kl_estimate, kl_loss

MU = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
OPTIMUM = torch.softmax(MU.log() + torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64) / 0.5, 0)
"""Of three arms with scores 1, 0, -1 at beta 0.5."""


def gradient(logits: Tensor, loss: Tensor) -> list[float]:
    (found,) = torch.autograd.grad(loss, logits)
    return found.tolist()


@pytest.mark.parametrize(
    ("kind", "mean"), [("k1", 0.7217895), ("k2", 0.7510199), ("k3", 0.7217895)]
)
def test_means(kind, mean) -> None:
    estimates = kl_estimate(kind, OPTIMUM.log(), MU.log())
    assert (OPTIMUM * estimates).sum().item() == pytest.approx(mean, abs=5e-8)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [0.0, 0.0, 0.0]),
        ("k2", [0.421654, -0.352777, -0.068876]),  # of KL(policy, reference)
        ("k3", [0.532165, -0.252280, -0.279885]),  # policy - reference: of KL(reference, policy)
    ],
)
def test_gradients_as_a_loss(kind, expected) -> None:
    """On the policy's own samples, whose frequencies have no gradient."""
    logits = OPTIMUM.log().requires_grad_()
    logps = logits.log_softmax(0)
    loss = (OPTIMUM * kl_estimate(kind, logps, MU.log())).sum()
    assert gradient(logits, loss) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("k1", [-0.421532, 0.272065, 0.149467]), ("k3", [-0.021532, 0.072065, -0.050533])],
)
def test_defect_4_kl_estimator_in_the_wrong_place(kind, expected) -> None:
    """Defect 4: minus k1 as a reward pulls back to the reference; k3 pushes the third arm, which
    has less than its reference mass already, further away."""
    policy = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    logits = policy.log().requires_grad_()
    logps = logits.log_softmax(0)
    reward = -kl_estimate(kind, logps, MU.log()).detach()
    assert gradient(logits, (policy * reward * logps).sum()) == pytest.approx(expected, abs=1e-6)


def tree() -> tuple[Tensor, Tensor, Tensor]:
    """All answers of two tokens, (4, 2): their log-likelihoods under a policy of six logits, and
    under a reference; and those logits.
    """
    logits = torch.tensor([0.3, -0.2, 0.5, 0.1, -0.4, 0.2], dtype=torch.float64, requires_grad=True)

    def of(x: Tensor) -> Tensor:
        first, second = x[:2].log_softmax(0), x[2:].view(2, 2).log_softmax(1)
        return torch.stack(
            [
                torch.stack([first[a], second[a, b]])
                for a, b in itertools.product(range(2), repeat=2)
            ]
        )

    reference = torch.tensor([0.7, 0.3, 0.6, 0.4, 0.2, 0.8], dtype=torch.float64).log()
    return of(logits), of(reference), logits


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_a_loss_of_whole_answers_has_the_gradient_of_their_kl(kind) -> None:
    logps, reference, logits = tree()
    mask = torch.ones_like(logps, dtype=torch.bool)
    p = logps.sum(1).exp()
    exact = gradient(logits, (p * (logps - reference).sum(1)).sum())
    logps, reference, logits = tree()
    losses = kl_loss(kind, logps, logps.detach(), reference, mask)
    assert gradient(logits, (p.detach() * losses).sum()) == pytest.approx(exact, abs=1e-12)
    logps, reference, logits = tree()
    token_by_token = (p.detach().unsqueeze(1) * 0.5 * (logps - reference) ** 2).sum()
    assert np.abs(np.subtract(gradient(logits, token_by_token), exact)).max() > 0.01


def test_a_ratio_keeps_k3_right_off_the_policy() -> None:
    """Answers of an older policy, weighted by the ratio, give the same value and gradient."""
    logps, reference, logits = tree()
    old = reference + 0.3 * torch.tensor([[1.0, -1], [1, 1], [-1, 0.5], [-1, -0.5]])
    old = old - old.sum(1).logsumexp(0) / 2
    p = logps.sum(1).exp()
    exact = (p * (logps - reference).sum(1)).sum()
    value, slope = exact.item(), gradient(logits, exact)
    logps, reference, logits = tree()
    mask = torch.ones_like(logps, dtype=torch.bool)
    found = (old.sum(1).exp() * kl_loss("k3", logps, old, reference, mask)).sum()
    assert found.item() == pytest.approx(value, abs=1e-12)
    assert gradient(logits, found) == pytest.approx(slope, abs=1e-12)


def test_masked_tokens_and_far_answers() -> None:
    logps = torch.tensor([[-1.0, float("nan")], [-50.0, -60.0]], requires_grad=True)
    reference = torch.tensor([[-1.5, float("inf")], [-1.0, -1.0]])
    mask = torch.tensor([[True, False], [True, True]])
    losses = kl_loss("k3", logps, logps.detach(), reference, mask)
    losses.sum().backward()
    assert losses[0].item() == pytest.approx(np.exp(-0.5) - 1 + 0.5)
    assert losses.isfinite().all() and logps.grad is not None and logps.grad.isfinite().all()


def test_k1_is_no_loss_and_unknown_kinds_are_named() -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(ConfigError, match="'k1'"):
        kl_loss("k1", x, x, x, x > -1)
    with pytest.raises(ConfigError, match="Did you mean 'k3'"):
        kl_estimate("k_3", x, x)
    assert list(KL_ESTIMATES) == ["k1", "k2", "k3"]
