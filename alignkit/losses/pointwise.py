"""Losses that judge each answer of a pair by itself. Symbols as in preference.py.

They see the level of the log-ratios and not only their difference: what both answers gain alike
changes them, by design. Unlike DPO, they can hold up the likelihood of the chosen answer.
"""

from __future__ import annotations

import math
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from alignkit.losses.defaults import betas
from alignkit.losses.scores import PairScores
from alignkit.losses.table import Golden, PairLoss


def nca_pair(scores: PairScores, *, beta: float) -> Float[Tensor, " B"]:
    """NCA: L(b w) + L(-b w)/2 + L(-b l)/2.

    Chen et al. 2024 (2402.05369), for pairs: the chosen answer is told from noise, and both
    answers are held near the reference.

    Args:
        scores: B pairs.
        beta: strength of the KL to the reference.

    Returns:
        (B,) per-pair losses; 2 ln 2 where policy = reference.
    """
    w, ell = beta * scores.chosen, beta * scores.rejected
    return softplus(-w) + (softplus(w) + softplus(ell)) / 2


def bco_pair(scores: PairScores, *, beta: float, shift: float = 0.0) -> Float[Tensor, " B"]:
    """BCO on pairs: L(b w - d) + L(d - b l), d = shift.

    Jung et al. 2024 (2404.04656): a binary classifier of liked and disliked answers. Here d is a
    constant, 0 as in TRL; the running shift of the paper is `bco` on single answers.

    Args:
        scores: B pairs.
        beta: strength of the KL to the reference.
        shift: d, the reward at which an answer counts as undecided.

    Returns:
        (B,) per-pair losses; 2 ln 2 where policy = reference and d = 0.
    """
    return softplus(shift - beta * scores.chosen) + softplus(beta * scores.rejected - shift)


def sppo_hard(scores: PairScores, *, beta: float) -> Float[Tensor, " B"]:
    """SPPO with certain wins: (w - 1/(2b))^2 + (l + 1/(2b))^2.

    Wu et al. 2024 (2405.00675) Eq. 4.7 with win probabilities 1 and 0.

    Args:
        scores: B pairs.
        beta: 1 / eta of the paper.

    Returns:
        (B,) per-pair losses; 1/(2 b^2) where policy = reference.
    """
    target = 1 / (2 * beta)
    return (scores.chosen - target) ** 2 + (scores.rejected + target) ** 2


def sppo(scores: PairScores, *, beta: float) -> Float[Tensor, " B"]:
    """SPPO: (w - (q - 1/2)/b)^2 + (l + (q - 1/2)/b)^2, q = `p_chosen`.

    Wu et al. 2024 (2405.00675) Eq. 4.7: each log-ratio is fitted to the answer's win probability
    against the policy of the round, q for the chosen answer and 1 - q for the rejected one. Same
    gradient as `sppo_hard` under `p_chosen`, but 0 at its minimum.

    Args:
        scores: B pairs; q = 1 without `p_chosen`.
        beta: 1 / eta of the paper.

    Returns:
        (B,) per-pair losses; 2 ((q - 1/2) / b)^2 where policy = reference.
    """
    q = 1.0 if scores.p_chosen is None else scores.p_chosen
    target = (q - 0.5) / beta
    return (scores.chosen - target) ** 2 + (scores.rejected + target) ** 2


def apo_zero(scores: PairScores, *, beta: float) -> Float[Tensor, " B"]:
    """APO-zero: 1 - s(b w) + s(b l).

    D'Oosterlinck et al. 2024 (2408.06266) Eq. 7: raises the chosen answer and lowers the rejected
    one. For data whose chosen answers are better than the policy's own.

    Args:
        scores: B pairs.
        beta: how soon the loss saturates.

    Returns:
        (B,) per-pair losses; 1 where policy = reference.
    """
    return torch.sigmoid(-beta * scores.chosen) + torch.sigmoid(beta * scores.rejected)


def apo_down(scores: PairScores, *, beta: float) -> Float[Tensor, " B"]:
    """APO-down: s(b w) + 1 - s(b h - m).

    D'Oosterlinck et al. 2024 (2408.06266) Eq. 8: lowers both answers, the rejected one more. For
    data whose chosen answers are worse than the policy's own.

    Args:
        scores: B pairs.
        beta: how soon the loss saturates.

    Returns:
        (B,) per-pair losses; 1 where policy = reference and m = 0.
    """
    return torch.sigmoid(beta * scores.chosen) + torch.sigmoid(-scores.logit(beta))


def cal_dpo(scores: PairScores, *, beta: float) -> Float[Tensor, " B"]:
    """Cal-DPO: L(h) + (w - 1/(2b))^2 + (l + 1/(2b))^2.

    Xiao et al. 2024 (2412.14516): DPO on the plain margin, with the log-ratios calibrated to a
    reward of +1/2 and -1/2.

    Args:
        scores: B pairs, in nats: the margin stands in L without beta.
        beta: the log-ratios' targets are +-1/(2b).

    Returns:
        (B,) per-pair losses; ln 2 + 1/(2 b^2) where policy = reference.
    """
    return softplus(-scores.margin) + sppo_hard(scores, beta=beta)


_LAWS = frozenset({"step0", "swap", "scaling", "ratio", "batch", "p_chosen", "weight"})
_NO_LOGIT = MappingProxyType(
    {"target_margin": "it judges each answer by itself and has no logit of the pair to offset"}
)
_FIXED = MappingProxyType(
    {"target_margin": "it fits each log-ratio to a target, and those targets are its margin"}
)
_LEVEL = (
    "it sees the level of each log-ratio, and the reward behind another divergence is known up to "
    "a constant of the prompt only"
)
_SPPO_BETA = "Wu et al. 2024: eta 1e3"

ROWS = (
    PairLoss(
        name="nca_pair",
        function=nca_pair,
        paper="Chen et al. 2024, Noise Contrastive Alignment, arXiv:2402.05369",
        equation="L(b w) + L(-b w)/2 + L(-b l)/2",
        betas=betas(),
        laws=_LAWS,
        golden=Golden(0.1, 1.3508248),
        minimiser="b w* = ln(2p), b l* = ln(2(1-p))",
        at_reference=lambda beta: 2 * math.log(2),
        refuses=_NO_LOGIT,
        no_divergence=_LEVEL,
    ),
    PairLoss(
        name="bco_pair",
        function=bco_pair,
        paper="Jung et al. 2024, Binary Classifier Optimization, arXiv:2404.04656",
        equation="L(b w - d) + L(d - b l), d = shift",
        betas=betas(),
        laws=_LAWS,
        golden=Golden(0.1, 1.3128563),
        minimiser="b w* = d + logit(p), b l* = d - logit(p)",
        at_reference=lambda beta: 2 * math.log(2),
        refuses=_NO_LOGIT,
        no_divergence=_LEVEL,
    ),
    PairLoss(
        name="sppo_hard",
        function=sppo_hard,
        paper="Wu et al. 2024, Self-Play Preference Optimization, arXiv:2405.00675, Eq. 4.7",
        equation="(w - 1/(2b))^2 + (l + 1/(2b))^2",
        betas=betas(1e-3, _SPPO_BETA),
        laws=_LAWS,
        golden=Golden(0.1, 36.25),
        minimiser="w* = (p - 1/2)/b, l* = -w*",
        at_reference=lambda beta: 1 / (2 * beta**2),
        refuses=_FIXED,
        no_divergence=_LEVEL,
    ),
    PairLoss(
        name="sppo",
        function=sppo,
        paper="Wu et al. 2024, Self-Play Preference Optimization, arXiv:2405.00675, Eq. 4.7",
        equation="(w - (q - 1/2)/b)^2 + (l + (q - 1/2)/b)^2, q = p_chosen",
        betas=betas(1e-3, _SPPO_BETA),
        laws=_LAWS - {"p_chosen", "step0"},
        golden=Golden(0.1, 36.25),
        minimiser="w* = (q - 1/2)/b, l* = -w*",
        at_reference=lambda beta: 1 / (2 * beta**2),
        refuses=_FIXED,
        no_divergence=_LEVEL,
        mixes=False,
    ),
    PairLoss(
        name="apo_zero",
        function=apo_zero,
        paper="D'Oosterlinck et al. 2024, Anchored Preference Opt., arXiv:2408.06266, Eq. 7",
        equation="1 - s(b w) + s(b l)",
        betas=betas(),
        laws=_LAWS,
        golden=Golden(0.1, 0.9625234),
        minimiser="none: bounded and monotone in w and l",
        at_reference=lambda beta: 1.0,
        refuses=_NO_LOGIT,
        no_divergence=_LEVEL,
    ),
    PairLoss(
        name="apo_down",
        function=apo_down,
        paper="D'Oosterlinck et al. 2024, Anchored Preference Opt., arXiv:2408.06266, Eq. 8",
        equation="s(b w) + 1 - s(b h - m)",
        betas=betas(),
        laws=_LAWS,
        golden=Golden(0.1, 0.9875493),
        minimiser="none: bounded, and monotone in l",
        at_reference=lambda beta: 1.0,
        no_divergence=_LEVEL,
    ),
    PairLoss(
        name="cal_dpo",
        function=cal_dpo,
        paper="Xiao et al. 2024, Cal-DPO, arXiv:2412.14516",
        equation="L(h) + (w - 1/(2b))^2 + (l + 1/(2b))^2",
        betas=betas(2e-3, "Xiao et al. 2024, the authors' configuration", scale_free=False),
        laws=_LAWS - {"scaling"},
        golden=Golden(0.1, 36.4514133),
        minimiser="w* = -l* = h/2, h the root of s(h) - p + h - (2p - 1)/b = 0",
        at_reference=lambda beta: math.log(2) + 1 / (2 * beta**2),
        scale_free=False,
        refuses=_FIXED,
        no_divergence=_LEVEL,
    ),
)
