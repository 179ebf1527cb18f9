"""Losses of single labelled answers: pure functions of one log-ratio and one label each.

Symbols: b = beta, r = log-ratio of policy to reference of an answer, s(x) = sigmoid(x),
L(x) = -log s(x). Class weights (`desirable_weight`, `undesirable_weight`) multiply every row of the
table and are no affair of the functions.
"""

from __future__ import annotations

import math
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from alignkit.losses.defaults import betas
from alignkit.losses.ranges import within
from alignkit.losses.running import running, running_mean
from alignkit.losses.scores import UnpairedScores, needed
from alignkit.losses.table import Beta, Golden, State, UnpairedLoss


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


def apo_zero_unpaired(scores: UnpairedScores, *, beta: float) -> Float[Tensor, " B"]:
    """APO-zero on single answers: 1 - s(b r) for a liked answer, s(b r) for a disliked one.

    D'Oosterlinck et al. 2024 (2408.06266) Eq. 7, unpaired as in TRL: KTO with a baseline of 0.

    Args:
        scores: B answers.
        beta: how soon the loss saturates.

    Returns:
        (B,) losses in (0, 1); one half where policy = reference.
    """
    gain = beta * scores.log_ratio
    return torch.sigmoid(torch.where(scores.desirable.bool(), -gain, gain))


def bco(
    scores: UnpairedScores, *, beta: float, state: State, momentum: float = 0.9
) -> Float[Tensor, " B"]:
    """BCO: L(b r - d) for a liked answer, L(d - b r) for a disliked one.

    Jung et al. 2024 (2404.04656): a binary classifier whose threshold d is halfway between the
    running mean rewards b r of the two classes; detached. While one class has not been seen, d is
    the other's mean.

    Args:
        scores: the B answers of the global batch.
        beta: strength of the KL to the reference.
        state: of `bco_state`.
        momentum: of the running means.

    Returns:
        (B,) losses; ln 2 where policy = reference.
    """
    within("[0, 1)", "bco", momentum=momentum)
    seen = (state["reward.mass"] > 0).double()
    shift = (running(state, "reward") * seen).sum() / seen.sum()
    logit = beta * scores.log_ratio - shift.to(scores.policy.dtype)
    return softplus(torch.where(scores.desirable.bool(), -logit, logit))


def bco_state(
    scores: UnpairedScores, state: State, *, beta: float, momentum: float = 0.9
) -> dict[str, Tensor]:
    """Running mean rewards of disliked and liked answers, this batch included."""
    reward = beta * scores.log_ratio.detach().double()
    weight = torch.ones_like(reward) if scores.weight is None else scores.weight.double()
    liked = scores.desirable.to(reward)
    share = torch.stack([weight * (1 - liked), weight * liked])
    total = share.sum(1)
    mean = (share * reward).sum(1) / total.clamp(min=1e-300)
    return running_mean(state, "reward", mean, momentum, present=total > 0)


def nca(scores: UnpairedScores, *, beta: float) -> Float[Tensor, " B"]:
    """NCA: L(b r) + L(-b r)/2 for a liked answer, L(-b r)/2 for a disliked one.

    Chen et al. 2024 (2402.05369): a liked answer is told from noise, and every answer is held near
    the reference. A liked and a disliked answer together are `nca_pair`.

    Args:
        scores: B answers.
        beta: strength of the KL to the reference.

    Returns:
        (B,) losses; (3 ln 2)/2 for a liked and (ln 2)/2 for a disliked one where policy =
        reference.
    """
    gain = beta * scores.log_ratio
    return softplus(gain) / 2 + torch.where(scores.desirable.bool(), softplus(-gain), 0.0)


_IMAGE_BETA = Beta(2000.0, "Li et al. 2024, the authors' code: 1000 on errors without one half")
_LEVEL = (
    "it sees the level of each log-ratio, and the reward behind another divergence is known up to "
    "a constant of the prompt only"
)
_LAWS = frozenset({"step0", "ratio", "scaling", "batch", "weight"})

ROWS = (
    UnpairedLoss(
        name="kto",
        function=kto,
        paper="Ethayarajh et al. 2024, KTO, arXiv:2402.01306, Eq. 7 and 8; "
        "images: Li et al. 2024, arXiv:2404.04465",
        equation="liked: 1 - s(b (r - z)); disliked: 1 - s(b (z - r)); z = max(0, mean kl)",
        betas=betas(source="Ethayarajh et al. 2024, as in TRL", image=_IMAGE_BETA),
        laws=_LAWS - {"batch"},
        golden=Golden(0.1, 0.4812589),
        minimiser="none: bounded and monotone in each r",
        at_reference=lambda beta: 0.5,
        no_divergence=_LEVEL,
        coupled=True,
        needs=("kl",),
    ),
    UnpairedLoss(
        name="apo_zero_unpaired",
        function=apo_zero_unpaired,
        paper="D'Oosterlinck et al. 2024, Anchored Preference Opt., arXiv:2408.06266, Eq. 7",
        equation="liked: 1 - s(b r); disliked: s(b r)",
        betas=betas(source="as in TRL"),
        laws=_LAWS,
        golden=Golden(0.1, 0.4812617),
        minimiser="none: bounded and monotone in each r",
        at_reference=lambda beta: 0.5,
        no_divergence=_LEVEL,
    ),
    UnpairedLoss(
        name="bco",
        function=bco,
        paper="Jung et al. 2024, Binary Classifier Optimization, arXiv:2404.04656",
        equation="liked: L(b r - d); disliked: L(d - b r); d = midway of the running mean rewards",
        betas=betas(source="Jung et al. 2024, as in TRL"),
        laws=_LAWS - {"batch"},
        golden=Golden(0.1, 0.6563501),
        minimiser="b r* = d + logit of the probability that the answer is liked",
        at_reference=lambda beta: math.log(2),
        no_divergence=_LEVEL,
        coupled=True,
        update=bco_state,
    ),
    UnpairedLoss(
        name="nca",
        function=nca,
        paper="Chen et al. 2024, Noise Contrastive Alignment, arXiv:2402.05369",
        equation="liked: L(b r) + L(-b r)/2; disliked: L(-b r)/2",
        betas=betas(),
        laws=_LAWS,
        golden=Golden(0.1, 0.6754124),
        minimiser="b r* = ln(2q), q = probability that the answer is liked",
        at_reference=lambda beta: math.log(2),
        no_divergence=_LEVEL,
    ),
)

UNPAIRED_LOSSES = MappingProxyType({row.name: row for row in ROWS})
"""Name -> loss of single labelled answers."""
