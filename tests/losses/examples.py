"""The standard inputs of the loss tests, in any precision."""

from __future__ import annotations

import math
from typing import Any

import torch

from alignkit.losses import (
    GROUP_LOSSES,
    PREFERENCE_LOSSES,
    UNPAIRED_LOSSES,
    GroupScores,
    PairScores,
    UnpairedScores,
)

DTYPES = {torch.float64: 1e-6, torch.float32: 1e-5}
"""Precision -> relative tolerance of a golden value."""


def one_pair(dtype: torch.dtype = torch.float64, **more: float | None) -> PairScores:
    """p = -10, -12; r = -11, -11.5: w = 1, l = -0.5; 5 and 8 tokens; scores sqrt(e) apart."""
    given = {
        "policy_chosen": -10.0,
        "policy_rejected": -12.0,
        "reference_chosen": -11.0,
        "reference_rejected": -11.5,
        "chosen_length": 5.0,
        "rejected_length": 8.0,
        "score_chosen": 1.0,
        "score_rejected": 1 - math.exp(0.5),
        "uniform": 0.5,
        **more,
    }
    tensors = {
        name: None if value is None else torch.tensor([value], dtype=dtype)
        for name, value in given.items()
    }
    return PairScores(**tensors)


def image_pair(dtype: torch.dtype = torch.float64) -> PairScores:
    """Mean squared errors 0.1 of the winner and 0.101 of the loser."""
    return one_pair(dtype, policy_chosen=-0.05, policy_rejected=-0.0505)


def batch3(dtype: torch.dtype = torch.float64, **more: Any) -> PairScores:
    """W = [3, 0, -3], L = [-1, 1.5, 1.5], h = [4, -1.5, -4.5]."""
    return PairScores(
        torch.tensor([-10.0, -8, -20], dtype=dtype),
        torch.tensor([-12.0, -7, -15], dtype=dtype),
        torch.tensor([-13.0, -8, -17], dtype=dtype),
        torch.tensor([-11.0, -8.5, -16.5], dtype=dtype),
        **{name: torch.as_tensor(value, dtype=dtype) for name, value in more.items()},
    )


def answers(
    ratios: list[float],
    liked: list[bool],
    kl: float | list[float] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    weight: list[float] | None = None,
) -> UnpairedScores:
    """Single answers with the given log-ratios and labels."""
    ratio = torch.tensor(ratios, dtype=dtype)
    return UnpairedScores(
        ratio - 3,
        torch.full_like(ratio, -3),
        torch.tensor(liked),
        kl=None if kl is None else torch.tensor(kl, dtype=dtype).expand_as(ratio),
        weight=None if weight is None else torch.tensor(weight, dtype=dtype),
    )


def group(
    ratios: list[float], rank: list[int], *, dtype: torch.dtype = torch.float64
) -> GroupScores:
    """One group with the given log-ratios and ranks."""
    ratio = torch.tensor([ratios], dtype=dtype)
    return GroupScores(
        ratio - 5,
        torch.full_like(ratio, -5),
        torch.tensor([rank]),
        torch.ones(1, len(rank)).bool(),
        length=torch.full_like(ratio, 4),
    )


def standard(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """The example of docs/formulas.md for a loss."""
    if name == "mapo":
        return image_pair(dtype)
    if name in PREFERENCE_LOSSES:
        return one_pair(dtype)
    if name in GROUP_LOSSES:
        return group([1.0, -0.5, -2.0], [0, 1, 2], dtype=dtype)
    assert name in UNPAIRED_LOSSES
    return answers([1.0, -0.5], [True, False], 0.3, dtype=dtype)
