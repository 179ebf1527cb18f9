"""Losses of single labelled answers: pure functions of one log-ratio and one label each.

Symbols: b = beta, r = log-ratio of policy to reference of an answer, s(x) = sigmoid(x),
L(x) = -log s(x). Class weights (`desirable_weight`, `undesirable_weight`) multiply every row of the
table and are no affair of the functions.
"""

from __future__ import annotations

from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from alignkit.losses.defaults import betas
from alignkit.losses.scores import UnpairedScores, needed
from alignkit.losses.table import Golden, UnpairedLoss


def kto(scores: UnpairedScores, *, beta: float) -> Float[Tensor, " B"]:
    """KTO: 1 - s(b (r - z)) for a liked answer, 1 - s(b (z - r)) for a disliked one.

    Ethayarajh et al. 2024 (2402.01306) Eq. 7 and 8. z = max(0, mean of the log-ratios of mismatched
    answers) over the global batch estimates KL(policy, reference) and is detached.

    Args:
        scores: the B answers of the global batch, with `kl`.
        beta: how soon the utility saturates; strength of the KL.

    Returns:
        (B,) losses in (0, 1); one half where policy = reference.

    Raises:
        ValueError: if `kl` is missing.
    """
    (kl,) = needed(scores, "kl", by="kto")
    weight = torch.ones_like(kl) if scores.weight is None else scores.weight
    baseline = ((weight * kl).sum() / weight.sum()).clamp(min=0).detach()
    gain = beta * (scores.log_ratio - baseline)
    return torch.sigmoid(torch.where(scores.desirable.bool(), -gain, gain))


_LAWS = frozenset({"step0", "ratio", "scaling", "batch", "weight"})

ROWS = (
    UnpairedLoss(
        name="kto",
        function=kto,
        paper="Ethayarajh et al. 2024, KTO, arXiv:2402.01306, Eq. 7 and 8",
        equation="liked: 1 - s(b (r - z)); disliked: 1 - s(b (z - r)); z = max(0, mean kl)",
        betas=betas(source="Ethayarajh et al. 2024, as in TRL"),
        laws=_LAWS - {"batch"},
        golden=Golden(0.1, 0.4812589),
        minimiser="none: bounded and monotone in each r",
        at_reference=lambda beta: 0.5,
        coupled=True,
        needs=("kl",),
    ),
)

UNPAIRED_LOSSES = MappingProxyType({row.name: row for row in ROWS})
"""Name -> loss of single labelled answers."""
