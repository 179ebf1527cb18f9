"""Losses of single labelled answers against hand-worked values."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.losses import UNPAIRED_LOSSES, UnpairedScores

DTYPES = {torch.float64: 1e-6, torch.float32: 1e-5}
LIKED = [True, True, True, False, False, False]


def answers(
    ratios: list[float],
    liked: list[bool],
    kl: float | list[float] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    weight: list[float] | None = None,
) -> UnpairedScores:
    ratio = torch.tensor(ratios, dtype=dtype)
    return UnpairedScores(
        ratio - 3,
        torch.full_like(ratio, -3),
        torch.tensor(liked),
        kl=None if kl is None else torch.tensor(kl, dtype=dtype).expand_as(ratio),
        weight=None if weight is None else torch.tensor(weight, dtype=dtype),
    )


BATCH6 = [3.0, 0, -3, -1, 1.5, 1.5]
GOLDENS = [
    ("kto", BATCH6, LIKED, 0.3, 0.5082733),
    ("kto", [1.0, -0.5], [True, False], 0.3, 0.4812589),
    ("kto", [1.0], [True], 0.3, 0.4825071),
    ("kto", [-0.5], [False], 0.3, 0.4800107),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "ratios", "liked", "kl", "golden"), GOLDENS)
def test_goldens(name, ratios, liked, kl, golden, dtype) -> None:
    found = UNPAIRED_LOSSES[name](answers(ratios, liked, kl, dtype=dtype), beta=0.1)
    assert found.dtype == dtype and len(found) == len(ratios)
    assert found.mean().item() == pytest.approx(golden, rel=DTYPES[dtype])


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
