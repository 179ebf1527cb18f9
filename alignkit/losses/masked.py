"""Sums, means and whitening over the tokens that count.

What stands in a masked place is never read: it may be anything, NaN too, without touching a sum or
a gradient. Statistics are those of the *global* batch: whitening per process would make the result
depend on how many there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from alignkit.protocols import Collective

FLOOR = 1e-8
"""Of a variance that is divided by."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and population variance of the values that count, float64 scalars."""

    count: Tensor
    mean: Tensor
    variance: Tensor


def only(values: Tensor, mask: Tensor) -> Tensor:
    """`values`, 0 where the mask says no; what stood there gets no gradient."""
    return torch.where(mask, values, torch.zeros_like(values))


def masked_sum(
    values: Float[Tensor, "..."], mask: Bool[Tensor, "..."], dim: int | None = None
) -> Tensor:
    """Sum of the values that count, over all dimensions or one.

    Args:
        values: of any shape.
        mask: of the same shape; True counts.
        dim: None sums over everything.
    """
    kept = only(values, mask)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(
    values: Float[Tensor, "..."], mask: Bool[Tensor, "..."], dim: int | None = None
) -> Tensor:
    """Mean of the values that count, over all dimensions or one; 0 where none does."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def moments(
    values: Float[Tensor, "..."],
    mask: Bool[Tensor, "..."] | None = None,
    collective: Collective | None = None,
) -> Moments:
    """Mean and population variance, 1/n sum (x - mean)^2, of all values of all processes.

    In two passes and float64, so that neither a large common part nor the split over processes
    costs digits.

    Args:
        values: of any shape; detached.
        mask: of the same shape; None counts all.
        collective: the other processes, all of which must call this; None is this one alone.
    """
    x = values.detach().double()
    kept = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    count, total = _everywhere(torch.stack([kept.sum().double(), masked_sum(x, kept)]), collective)
    mean = total / count.clamp(min=1)
    apart = _everywhere(masked_sum((x - mean) ** 2, kept), collective)
    return Moments(count, mean, apart / count.clamp(min=1))


def whiten(
    values: Float[Tensor, "..."],
    mask: Bool[Tensor, "..."] | None = None,
    *,
    shift_mean: bool = True,
    moments: Moments | None = None,
) -> Float[Tensor, "..."]:
    """(x - mean) / std over what counts, with the population's std; [+ mean unless `shift_mean`].

    Ziegler et al. 2019 (1909.08593), code: advantages lose their mean, rewards keep it. Whitening
    rescales the policy's loss against an entropy bonus, a KL or a pretraining loss beside it, so
    that their optimum depends on the batch's std; a closed-form optimum needs it off.

    Args:
        values: of any shape.
        mask: of the same shape; None counts all. Masked places come out as 0.
        shift_mean: False puts the mean back on.
        moments: of the global batch, by `moments`; None takes those of `values` alone.

    Returns:
        The same shape and dtype. Fewer than two values that count are returned as they are, since
        they have no spread; a spread of less than 1e-4 is taken as 1e-4.
    """
    kept = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    known = _moments(values, kept) if moments is None else moments
    x = only(values, kept).double()
    white = (x - known.mean) / known.variance.clamp(min=FLOOR).sqrt()
    white = white if shift_mean else white + known.mean
    return only(torch.where(known.count < 2, x, white).to(values.dtype), kept)


_moments = moments  # `whiten` has an argument of this name


def _everywhere(value: Tensor, collective: Collective | None) -> Tensor:
    return value if collective is None else collective.sum(value)
