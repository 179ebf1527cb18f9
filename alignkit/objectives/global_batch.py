"""Losses that couple the batch, under any split: two passes over it.

    1  scores of all pieces without gradient, gathered over processes, in the order of positions
    2  the losses of the global batch, and d (summed loss) / d score
    3  the forward again, piece by piece, with those slopes as the gradient of the scores

The gradient is exact: d loss / d parameter = sum of slope * d score / d parameter. Rows of weight 0
are gone before any statistic, sort or pairing sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alignkit.objectives.kinds import Scores
from alignkit.objectives.pieces import Known, Micro, Scored
from alignkit.protocols import Collective


def couple(
    pieces: Sequence[Micro],
    scored: Sequence[Scored],
    collective: Collective,
    losses_of: Callable[[Scores], Tensor],
) -> list[Known]:
    """What the losses of the global batch are for each piece. All processes must call it.

    Args:
        pieces: this process's share.
        scored: their numbers, detached.
        collective: the other processes.
        losses_of: scores of the global batch -> (B,) losses.
    """
    position = torch.cat([piece.batch.position for piece in pieces])  # (B_own,) on the CPU
    weight = torch.cat([piece.batch.weights() for piece in pieces])
    present = (weight > 0).nonzero().flatten()
    columns = _columns(scored)
    table = torch.stack([value.detach() for value in columns.values()], dim=1)  # (B_own, F)

    order = collective.gather(position[present])
    order, places = order.sort()
    weight = collective.gather(weight[present])[places]
    table = collective.gather(table[present.to(table.device)])[places.to(table.device)]
    sound = table.isfinite().all()

    found = dict(zip(columns, table.unbind(1), strict=True))
    factor = found.pop("factor", None)
    scores = _rebuilt(scored[0].scores, found, weight)
    losses, slopes = _slopes(scores, factor, weight, losses_of)
    # A process without a row holds an absent one, whose slopes are 0 wherever it looks.
    own = torch.searchsorted(order, position).clamp(max=len(order) - 1)
    split = own.split([piece.batch.num_groups for piece in pieces])
    return [
        _known(piece, one, where, losses, slopes, sound)
        for piece, one, where in zip(pieces, scored, split, strict=True)
    ]


def _columns(scored: Sequence[Scored]) -> dict[str, Tensor]:
    """Each field of the scores over all pieces, and the factor, in the dtype of the policy's."""
    columns = {}
    for name, value in vars(scored[0].scores).items():
        if isinstance(value, Tensor) and name != "weight":
            assert value.ndim == 1, f"{name}: losses of rankings do not couple the batch"
            columns[name] = torch.cat([getattr(one.scores, name) for one in scored])
    if scored[0].factor is not None:
        columns["factor"] = torch.cat([one.factor for one in scored if one.factor is not None])
    dtype = next(iter(columns.values())).dtype
    return {name: value.to(dtype) for name, value in columns.items()}


def _rebuilt(like: Any, columns: dict[str, Tensor], weight: Tensor) -> Scores:
    """Scores of the global batch; without weights where all are 1, as a single pass has them."""
    values = {name: value.to(getattr(like, name).dtype) for name, value in columns.items()}
    device = next(iter(values.values())).device
    some = None if bool((weight == 1).all()) else weight.to(device)
    return replace(like, **values, weight=some)


def _slopes(
    scores: Any, factor: Tensor | None, weight: Tensor, losses_of: Callable[[Scores], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in vars(scores).items()
        if name.startswith("policy")
    }
    with torch.enable_grad():
        losses = losses_of(replace(scores, **leaves))
        counted = losses.double() * weight.to(losses.device)
        total = (counted if factor is None else counted * factor).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return losses.detach(), dict(zip(leaves, gradients, strict=True))


def _known(
    piece: Micro,
    scored: Scored,
    where: Tensor,
    losses: Tensor,
    slopes: dict[str, Tensor],
    sound: Tensor,
) -> Known:
    where = where.to(losses.device)
    there = (piece.batch.weights() > 0).to(losses)
    own = {name: slope[where] * there for name, slope in slopes.items()}
    return Known(scored, losses[where], own, sound)
