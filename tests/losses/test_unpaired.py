"""Losses of single labelled answers against hand-worked values."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.losses import UNPAIRED_LOSSES, UnpairedScores
from tests.losses.examples import answers

LIKED = [True, True, True, False, False, False]
BATCH6 = [3.0, 0, -3, -1, 1.5, 1.5]


def test_kto_s_baseline_is_the_weighted_mean_of_mismatched_answers_and_never_negative() -> None:
    def loss(kl: list[float], weight: list[float] | None = None) -> float:
        scores = answers([1.0, -0.5], [True, False], kl, weight=weight)
        return UNPAIRED_LOSSES["kto"](scores, beta=0.1)[0].item()

    def at(baseline: float) -> float:
        return 1 / (1 + math.exp(0.1 * (1 - baseline)))

    assert loss([0.5, 0.1]) == pytest.approx(at(0.3), rel=1e-12)
    assert loss([0.5, 0.1], [3.0, 1.0]) == pytest.approx(at(0.4), rel=1e-12)
    assert loss([-0.5, 0.1]) == pytest.approx(at(0.0), rel=1e-12)


def test_no_gradient_reaches_kto_s_baseline() -> None:
    kl = torch.tensor([0.5, 0.1], requires_grad=True)
    ratio = torch.tensor([1.0, -0.5], requires_grad=True)
    scores = UnpairedScores(ratio, torch.zeros(2), torch.tensor([True, False]), kl=kl)
    UNPAIRED_LOSSES["kto"](scores, beta=0.1).sum().backward()
    assert kl.grad is None and ratio.grad[0] < 0 < ratio.grad[1]


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_class_weights_multiply_their_class_only(name) -> None:
    scores = answers(BATCH6, LIKED, 0.3)
    plain = UNPAIRED_LOSSES[name](scores, beta=0.1)
    weighted = UNPAIRED_LOSSES[name](scores, beta=0.1, undesirable_weight=2.0)
    assert torch.equal(weighted[:3], plain[:3]) and torch.equal(weighted[3:], 2 * plain[3:])
    weighted = UNPAIRED_LOSSES[name](scores, beta=0.1, desirable_weight=0.25)
    assert torch.equal(weighted[:3], plain[:3] / 4) and torch.equal(weighted[3:], plain[3:])
    with pytest.raises(ConfigError, match=r"desirable_weight of .* must be in \[0, inf\)"):
        UNPAIRED_LOSSES[name](scores, beta=0.1, desirable_weight=-1.0)


def test_kto_without_mismatched_answers_is_refused() -> None:
    with pytest.raises(ValueError, match="kto needs `kl`"):
        UNPAIRED_LOSSES["kto"](answers([1.0], [True]), beta=0.1)
