"""Margin losses that know the lengths or the scores of the two answers. Symbols as in
preference.py; |y_w| and |y_l| are completion tokens.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from alignkit.losses.defaults import betas
from alignkit.losses.ranges import within
from alignkit.losses.scores import PairScores, needed
from alignkit.losses.table import Golden, PairLoss

_SMALLEST_GAP = 1e-6


def sigmoid_norm(scores: PairScores, *, beta: float) -> Float[Tensor, " B"]:
    """Length-normalised DPO: L(b (w/|y_w| - l/|y_l|) - m).

    As in Lambert et al. 2024 (2411.15124). beta is larger by about the mean length.

    Args:
        scores: B pairs with lengths.
        beta: strength of the KL per token.

    Returns:
        (B,) per-pair losses; ln 2 where policy = reference and m = 0.

    Raises:
        ValueError: if the lengths are missing.
    """
    chosen, rejected = needed(scores, "chosen_length", "rejected_length", by="sigmoid_norm")
    margin = scores.chosen / chosen - scores.rejected / rejected
    return softplus(-scores.offset(beta * margin))


def rdpo(scores: PairScores, *, beta: float, length_coef: float = 0.02) -> Float[Tensor, " B"]:
    """R-DPO: L(b h + c (|y_w| - |y_l|) - m), c = length_coef.

    Park et al. 2024 (2403.19159): the reward is r - c |y|, so a chosen answer that is longer owes a
    part of its victory to its length, and has less left to learn.

    Args:
        scores: B pairs with lengths.
        beta: strength of the KL to the reference.
        length_coef: what a token costs, in units of the reward; 0 is DPO.

    Returns:
        (B,) per-pair losses; ln 2 where policy = reference, m = 0 and the lengths are equal.

    Raises:
        ValueError: if the lengths are missing.
    """
    chosen, rejected = needed(scores, "chosen_length", "rejected_length", by="rdpo")
    return softplus(-(scores.logit(beta) + length_coef * (chosen - rejected)))


def odpo(scores: PairScores, *, beta: float, alpha: float = 1.0) -> Float[Tensor, " B"]:
    """ODPO: L(b h - a ln(score_w - score_l) - m), a = alpha.

    Amini et al. 2024 (2402.10571): the further apart the two scores, the larger the margin that is
    asked for. Gaps below 1e-6, which the logarithm does not have, count as 1e-6: their pairs ask
    for nothing. The offset stays with the labelled winner under `p_chosen`.

    Args:
        scores: B pairs with the scores of the data.
        beta: strength of the KL to the reference.
        alpha: a >= 0; 0 is DPO.

    Returns:
        (B,) per-pair losses; ln 2 where policy = reference, m = 0 and the scores differ by 1.

    Raises:
        ValueError: if the scores of the data are missing.
    """
    within("[0, inf)", "odpo", alpha=alpha)
    chosen, rejected = needed(scores, "score_chosen", "score_rejected", by="odpo")
    offset = alpha * (chosen - rejected).clamp(min=_SMALLEST_GAP).log()
    return softplus(offset - scores.logit(beta))


def dpop(scores: PairScores, *, beta: float, lam: float = 50.0) -> Float[Tensor, " B"]:
    """DPO-positive: L(b (h - c max(0, -w)) - m), c = lam.

    Pal et al. 2024 (2402.13228): a chosen answer that becomes less likely than under the reference
    is penalised, against the likelihood displacement of DPO.

    Args:
        scores: B pairs.
        beta: strength of the KL to the reference.
        lam: weight of the penalty >= 0; 0 is DPO.

    Returns:
        (B,) per-pair losses; ln 2 where policy = reference and m = 0.
    """
    within("[0, inf)", "dpop", lam=lam)
    margin = scores.margin - lam * (-scores.chosen).clamp(min=0)
    return softplus(-scores.offset(beta * margin))


_LAWS = frozenset({"step0", "swap", "scaling", "ratio", "batch", "p_chosen", "weight"})

ROWS = (
    PairLoss(
        name="sigmoid_norm",
        function=sigmoid_norm,
        paper="Lambert et al. 2024, Tulu 3, arXiv:2411.15124",
        equation="L(b (w/|y_w| - l/|y_l|) - m)",
        betas=betas(5.0, "Lambert et al. 2024 (Tulu 3)"),
        laws=_LAWS,
        golden=Golden(0.1, 0.6801083),
        minimiser="w/|y_w| - l/|y_l| = logit(p)/b",
        at_reference=lambda beta: math.log(2),
        needs=("chosen_length", "rejected_length"),
    ),
    PairLoss(
        name="rdpo",
        function=rdpo,
        paper="Park et al. 2024, Disentangling Length from Quality, arXiv:2403.19159",
        equation="L(b h + c (|y_w| - |y_l|) - m), c = length_coef",
        betas=betas(),
        laws=(_LAWS | {"shift"}) - {"step0"},
        golden=Golden(0.1, 0.6491593),
        minimiser="h* = (logit(p) - c (|y_w| - |y_l|)) / b",
        at_reference=lambda beta: math.log(2),
        needs=("chosen_length", "rejected_length"),
    ),
    PairLoss(
        name="odpo",
        function=odpo,
        paper="Amini et al. 2024, DPO with an Offset, arXiv:2402.10571",
        equation="L(b h - a ln(score_w - score_l) - m), a = alpha",
        betas=betas(),
        laws=_LAWS | {"shift"},
        golden=Golden(0.1, 0.8833822),
        minimiser="h* of sigmoid with a target margin m + a ln(score_w - score_l)",
        at_reference=lambda beta: math.log(2),
        needs=("score_chosen", "score_rejected"),
    ),
    PairLoss(
        name="dpop",
        function=dpop,
        paper="Pal et al. 2024, Smaug, arXiv:2402.13228",
        equation="L(b (h - c max(0, -w)) - m), c = lam",
        betas=betas(),
        laws=_LAWS,
        golden=Golden(0.1, 0.6209570),
        minimiser="h* = logit(p)/b with w, l >= 0",
        at_reference=lambda beta: math.log(2),
        no_divergence="its penalty is a loss of log-likelihood of the chosen answer, not a reward",
    ),
)
