"""Margin losses against own derivations in Python numbers, and identities among them."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.losses import PREFERENCE_LOSSES
from tests.builders import pair_scores

GRID = (-30.0, -3.0, 0.0, 0.5, 3.0, 30.0)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def minus_log_sigma(x: float) -> float:
    return math.log1p(math.exp(-x)) if x > 0 else -x + math.log1p(math.exp(x))


def oracle(name: str, b: float, w: float, ell: float, e: float) -> tuple[float, float]:
    """(loss, d loss / d w) by the formulas, in Python numbers."""
    h = w - ell
    if name == "sigmoid":
        value = (1 - e) * minus_log_sigma(b * h) + e * minus_log_sigma(-b * h)
        return value, b * (sigma(b * h) - (1 - e))
    if name == "robust":
        value = ((1 - e) * minus_log_sigma(b * h) - e * minus_log_sigma(-b * h)) / (1 - 2 * e)
        return value, b * (-(1 - e) * sigma(-b * h) - e * sigma(b * h)) / (1 - 2 * e)
    if name == "hinge":
        return max(0.0, 1 - b * h), -b if b * h < 1 else 0.0
    return (h - 1 / (2 * b)) ** 2, 2 * (h - 1 / (2 * b))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("name", ["sigmoid", "robust", "hinge", "ipo"])
def test_values_and_gradients_follow_the_formula(name, smoothing) -> None:
    keywords = {"sigmoid": {"label_smoothing": smoothing}, "robust": {"label_smoothing": smoothing}}
    given = keywords.get(name, {"average": False} if name == "ipo" else {})
    # torch calls softplus(x) linear above 20, which costs 2e-9.
    for beta in (0.1, 0.7):
        for w, ell in [(w, ell) for w in GRID for ell in GRID]:
            scores = pair_scores(w, ell)
            scores.policy_chosen.requires_grad_()
            scores.policy_rejected.requires_grad_()
            loss = PREFERENCE_LOSSES[name](scores, beta=beta, **given)
            loss.sum().backward()
            value, slope = oracle(name, beta, w, ell, smoothing)
            assert loss.item() == pytest.approx(value, rel=1e-8, abs=1e-12)
            assert scores.policy_chosen.grad.item() == pytest.approx(slope, rel=1e-8, abs=1e-12)
            assert scores.policy_rejected.grad.item() == pytest.approx(-slope, rel=1e-8, abs=1e-12)


def test_ipo_averages_each_log_ratio_over_its_own_completion() -> None:
    scores = pair_scores(3.0, -2.0, chosen_length=4.0, rejected_length=10.0)
    scores.policy_chosen.requires_grad_()
    scores.policy_rejected.requires_grad_()
    loss = PREFERENCE_LOSSES["ipo"](scores, beta=0.5)
    loss.sum().backward()
    gap = 3 / 4 + 2 / 10 - 1
    assert loss.item() == pytest.approx(gap**2, rel=1e-12)
    assert scores.policy_chosen.grad.item() == pytest.approx(2 * gap / 4, rel=1e-12)
    assert scores.policy_rejected.grad.item() == pytest.approx(-2 * gap / 10, rel=1e-12)


LOGISTIC = [
    ("sigmoid_norm", {}),
    ("dpop", {}),
    ("beta_dpo", {"rho": 0.0}),
    ("sigmoid", {}),
    ("sigmoid", {"label_smoothing": 0.1}),
    *(("sigmoid", {"label_smoothing": e / 40}) for e in range(2, 21)),
    ("robust", {}),
    ("robust", {"label_smoothing": 0.37}),
]


@pytest.mark.parametrize("p_chosen", [None, 0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize(("name", "keywords"), LOGISTIC)
def test_policy_at_reference_costs_ln_2_to_the_last_bit(name, keywords, p_chosen) -> None:
    lengths = {"chosen_length": 5.0, "rejected_length": 8.0}
    scores = pair_scores([0.0] * 4, [0.0] * 4, dtype=torch.float32, p_chosen=p_chosen, **lengths)
    found = PREFERENCE_LOSSES[name](scores, beta=0.1, **keywords)
    assert torch.equal(found, torch.full((4,), math.log(2)))


@pytest.mark.parametrize("q", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_soft_labels_equal_label_smoothing(q) -> None:
    w, ell = torch.linspace(-20, 20, 9), torch.linspace(5, -9, 9)
    soft = PREFERENCE_LOSSES["sigmoid"](pair_scores(w, ell, p_chosen=q), beta=0.3)
    e = min(q, 1 - q)  # below one half the pair is smoothed with the opposite label
    scores = pair_scores(w, ell) if q >= 0.5 else pair_scores(ell, w)
    smooth = PREFERENCE_LOSSES["sigmoid"](scores, beta=0.3, label_smoothing=e)
    torch.testing.assert_close(soft, smooth, rtol=1e-12, atol=1e-12)


def test_robust_is_unbiased_under_flipped_labels() -> None:
    w, ell, e = torch.linspace(-20, 20, 9), torch.linspace(5, -9, 9), 0.2
    row = PREFERENCE_LOSSES["robust"]
    right = row(pair_scores(w, ell), beta=0.3, label_smoothing=e)
    wrong = row(pair_scores(ell, w), beta=0.3, label_smoothing=e)
    clean = torch.nn.functional.softplus(-0.3 * (w - ell).double())
    torch.testing.assert_close((1 - e) * right + e * wrong, clean, rtol=1e-9, atol=1e-12)
