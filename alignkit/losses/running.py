"""Running means that a loss carries from step to step (see `table.State`)."""

from __future__ import annotations

import torch
from torch import Tensor

from alignkit.losses.table import State


def running_mean(
    state: State, name: str, value: Tensor, momentum: float, present: Tensor | None = None
) -> dict[str, Tensor]:
    """An exponential mean and its mass, `value` included; it starts at the first value.

    The mass corrects the start, as in Adam: the mean is sum / mass.

    Args:
        state: the state so far; entries that are not there count 0.
        name: of the mean.
        value: () or (n,) float64 of this batch.
        momentum: the share of the past.
        present: like `value`, bool: whether the batch has a value at all; None is all.
    """
    here = torch.ones_like(value) if present is None else present.to(value)
    old_sum = state.get(f"{name}.sum", torch.zeros_like(value)).to(value)
    old_mass = state.get(f"{name}.mass", torch.zeros_like(value)).to(value)
    keep = 1 - (1 - momentum) * here
    value = torch.where(here > 0, value, 0.0)
    return {
        f"{name}.sum": keep * old_sum + (1 - momentum) * here * value,
        f"{name}.mass": keep * old_mass + (1 - momentum) * here,
    }


def running(state: State, name: str) -> Tensor:
    """The mean itself; 0 where nothing has been seen yet."""
    mass = state[f"{name}.mass"]
    return torch.where(mass > 0, state[f"{name}.sum"] / mass.clamp(min=1e-300), 0.0)
