"""Losses of rankings: pure functions of the log-ratios of K answers to one prompt.

Symbols: b = beta, s_i = b times the log-ratio of answer i, lse = logsumexp. Tied answers are one
block, and unranked ones the last block: no term tells the members of a block apart.
"""

from __future__ import annotations

import math
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

from alignkit.losses.defaults import betas
from alignkit.losses.scores import GroupScores
from alignkit.losses.table import Golden, GroupLoss


def _not_above(scores: GroupScores) -> tuple[Bool[Tensor, "G K K"], Bool[Tensor, "G K K"]]:
    """[g, i, j]: whether j is in i's block or below it, and whether in i's block."""
    place = torch.where(scores.rank < 0, scores.rank.shape[1], scores.rank)
    i, j = place[:, :, None], place[:, None, :]
    present = scores.mask[:, None, :] & scores.mask[:, :, None]
    return (j >= i) & present, (j == i) & present


def decided_pairs(scores: GroupScores) -> Bool[Tensor, "G K K"]:
    """[g, i, j]: whether answer i is ranked above answer j."""
    below, block = _not_above(scores)
    return below & ~block


def _lse(values: Tensor, where: Tensor) -> Tensor:
    """logsumexp over the last axis of the values where `where` holds; 0 where it never does."""
    none = ~where.any(-1)
    lowest = torch.finfo(values.dtype).min
    return torch.where(
        none, 0.0, torch.where(where | none[..., None], values, lowest).logsumexp(-1)
    )


def plackett_luce(scores: GroupScores, *, beta: float) -> Float[Tensor, " G"]:
    """Plackett-Luce DPO: sum over places k < K of lse(s_k .. s_K) - s_k, s in order of rank.

    Rafailov et al. 2023 (2305.18290) appendix A.3; Plackett 1975, Luce 1959. A tied block is one
    choice: lse(block and all below) - lse(block). Two answers are DPO.

    Args:
        scores: G groups of up to K answers.
        beta: strength of the KL to the reference.

    Returns:
        (G,) losses; ln K! where policy = reference and no two answers tie.
    """
    below, block = _not_above(scores)
    s = (beta * scores.log_ratio)[:, None, :].expand_as(below)
    choice = _lse(s, below) - _lse(s, block)
    # Each member of a block carries its share of the block's one term.
    return (choice / block.sum(-1).clamp(min=1)).sum(-1)


def all_pairs(scores: GroupScores, *, beta: float) -> Float[Tensor, " G"]:
    """All pairs: mean of L(s_i - s_j) over the pairs with i ranked above j.

    Ouyang et al. 2022 (2203.02155) Eq. 1, on implicit rewards: the pairs of one prompt are one
    example, and every prompt weighs the same whatever its K. Tied pairs are left out.

    Args:
        scores: G groups of up to K answers.
        beta: strength of the KL to the reference.

    Returns:
        (G,) losses; ln 2 where policy = reference, 0 for a group without any decided pair.
    """
    decided = decided_pairs(scores)
    s = beta * scores.log_ratio
    losses = torch.where(decided, softplus(s[:, None, :] - s[:, :, None]), 0.0)
    return losses.sum((1, 2)) / decided.sum((1, 2)).clamp(min=1)


def best_of_k(scores: GroupScores, *, beta: float) -> Float[Tensor, " G"]:
    """Best of K: lse(s_1 .. s_K) - s_best.

    Ziegler et al. 2019 (1909.08593) Eq. 1, on implicit rewards: a choice among K answers, whatever
    the order of the others. Several best answers are one choice.

    Args:
        scores: G groups of up to K answers.
        beta: strength of the KL to the reference.

    Returns:
        (G,) losses; ln K where policy = reference and one answer is best.
    """
    below, _ = _not_above(scores)
    best = scores.mask & (below.sum(-1) == scores.mask.sum(-1, keepdim=True))
    s = beta * scores.log_ratio
    return _lse(s, scores.mask) - _lse(s, best)


_LAWS = frozenset({"step0", "ratio", "shift", "scaling", "batch", "weight"})

ROWS = (
    GroupLoss(
        name="plackett_luce",
        function=plackett_luce,
        paper="Rafailov et al. 2023, Direct Preference Optimization, arXiv:2305.18290, app. A.3",
        equation="sum over k < K of lse(s_k .. s_K) - s_k, s = b times log-ratio, best first",
        betas=betas(),
        laws=_LAWS,
        golden=Golden(0.1, 1.5770553),
        minimiser="differences of s = differences of the Plackett-Luce utilities",
        at_reference=lambda beta: math.log(2),
    ),
    GroupLoss(
        name="all_pairs",
        function=all_pairs,
        paper="Ouyang et al. 2022, InstructGPT, arXiv:2203.02155, Eq. 1",
        equation="mean over i ranked above j of L(s_i - s_j)",
        betas=betas(),
        laws=_LAWS,
        golden=Golden(0.1, 0.5987564),
        minimiser="differences of s = differences of Bradley-Terry utilities",
        at_reference=lambda beta: math.log(2),
    ),
    GroupLoss(
        name="best_of_k",
        function=best_of_k,
        paper="Ziegler et al. 2019, Fine-Tuning Language Models, arXiv:1909.08593, Eq. 1",
        equation="lse(s_1 .. s_K) - s_best",
        betas=betas(),
        laws=_LAWS,
        golden=Golden(0.1, 0.9560983),
        minimiser="s_i = ln of the probability that answer i is chosen, up to a constant",
        at_reference=lambda beta: math.log(2),
    ),
)

GROUP_LOSSES = MappingProxyType({row.name: row for row in ROWS})
"""Name -> loss of rankings of K answers."""
