"""Margin losses: pure functions of the difference of two log-ratios.

Symbols: b = beta, w = log-ratio of policy to reference on the chosen answer, l = on the rejected
one, h = w - l the margin, m = `target_margin`, s(x) = sigmoid(x), L(x) = -log s(x) = softplus(-x).
All losses return (B,), unreduced and unweighted; means over the batch are the objective's affair,
*outside* the log-sigmoid.

What these functions cannot check: that policy and reference saw the same tokens, the same draw,
and no dropout. The law "policy = reference gives margin 0" does.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from alignkit.losses.defaults import betas
from alignkit.losses.divergences import capped_exp
from alignkit.losses.ranges import within
from alignkit.losses.scores import PairScores, needed
from alignkit.losses.table import Golden, PairLoss


def sigmoid(
    scores: PairScores, *, beta: float, label_smoothing: float = 0.0
) -> Float[Tensor, " B"]:
    """DPO: (1 - e) L(b h - m) + e L(-b h - m).

    Rafailov et al. 2023 (2305.18290) Eq. 7; with label smoothing e it is Mitchell's conservative
    DPO (2023), for labels flipped with probability e. d loss / d w = -b sigmoid(-b h) at e = 0.

    Args:
        scores: B pairs.
        beta: strength of the KL to the reference.
        label_smoothing: e in [0, 0.5].

    Returns:
        (B,) per-pair losses; ln 2 where policy = reference and m = 0.

    Raises:
        ConfigError: for e outside [0, 0.5].
    """
    within("[0, 0.5]", "sigmoid", label_smoothing=label_smoothing)
    loss = softplus(-scores.logit(beta))
    if label_smoothing == 0:
        return loss
    swapped = softplus(-scores.offset(-beta * scores.margin))
    # (1 - e) a + e s, written so that policy = reference gives ln 2 to the last bit.
    return loss + label_smoothing * (swapped - loss)


def robust(scores: PairScores, *, beta: float, label_smoothing: float = 0.1) -> Float[Tensor, " B"]:
    """rDPO: [(1 - e) L(b h - m) - e L(-b h - m)] / (1 - 2e).

    Chowdhury et al. 2024 (2403.00409) Eq. 12: unbiased for the clean loss when labels are flipped
    with probability e. Unbounded below, so keep gradient clipping on.

    Args:
        scores: B pairs.
        beta: strength of the KL to the reference.
        label_smoothing: the flip probability e in [0, 0.5).

    Returns:
        (B,) per-pair losses; ln 2 where policy = reference and m = 0.

    Raises:
        ConfigError: for e outside [0, 0.5).
    """
    within("[0, 0.5)", "robust", label_smoothing=label_smoothing)
    loss = softplus(-scores.logit(beta))
    swapped = softplus(-scores.offset(-beta * scores.margin))
    # Written as the plain loss plus a correction that vanishes at h = 0, so that policy = reference
    # gives ln 2 to the last bit: [(1-e) a - e s] / (1-2e) = a + e (a - s) / (1-2e).
    return loss + (label_smoothing / (1 - 2 * label_smoothing)) * (loss - swapped)


def hinge(scores: PairScores, *, beta: float) -> Float[Tensor, " B"]:
    """Hinge: max(0, 1 - (b h - m)).

    The SLiC form (Zhao et al. 2023, 2305.10425) on log-ratios, as in RSO (Liu et al. 2023,
    2309.06657).

    Args:
        scores: B pairs.
        beta: strength of the KL; 1 / beta is the margin at which a pair stops to push.

    Returns:
        (B,) per-pair losses; 1 where policy = reference and m = 0.
    """
    return (1 - scores.logit(beta)).clamp(min=0)


def ipo(scores: PairScores, *, beta: float, average: bool = True) -> Float[Tensor, " B"]:
    """IPO: (h - m / b - 1 / (2 b))^2, with per-token averages of w and l or their sums.

    Azar et al. 2023 (2310.12036) Eq. 17, where beta is called tau. The paper sums; its authors
    confirmed the per-token average for text, which is the default here as in other libraries. The
    two betas are not comparable.

    Args:
        scores: B pairs; with lengths when `average`.
        beta: tau; the margin's target is 1 / (2 tau).
        average: divide each log-ratio by its own completion length first.

    Returns:
        (B,) per-pair losses; 1 / (4 b^2) where policy = reference and m = 0.

    Raises:
        ValueError: if `average` and the lengths are missing.
    """
    margin = scores.margin
    if average:
        lengths = needed(scores, "chosen_length", "rejected_length", by="ipo(average=True)")
        margin = scores.chosen / lengths[0] - scores.rejected / lengths[1]
    offset = 0.0 if scores.target_margin is None else scores.target_margin / beta
    return (margin - offset - 1 / (2 * beta)) ** 2


def exo_pair(
    scores: PairScores, *, beta: float, label_smoothing: float = 1e-3
) -> Float[Tensor, " B"]:
    """EXO: s(x) [ln s(x) - ln(1 - e)] + s(-x) [ln s(-x) - ln e], x = b h - m.

    Ji et al. 2024 (2402.00856) Eq. 16: the reverse KL of the pair's softmax to the smoothed label.
    Its gradient vanishes where s(x) saturates.

    Args:
        scores: B pairs.
        beta: strength of the KL to the reference.
        label_smoothing: e in (0, 0.5]; its logarithm enters.

    Returns:
        (B,) per-pair losses; 0 where s(x) = 1 - e.

    Raises:
        ConfigError: for e outside (0, 0.5].
    """
    within("(0, 0.5]", "exo_pair", label_smoothing=label_smoothing)
    x = scores.logit(beta)
    chosen = torch.sigmoid(x) * (-softplus(-x) - math.log(1 - label_smoothing))
    return chosen + torch.sigmoid(-x) * (-softplus(x) - math.log(label_smoothing))


def discopop(scores: PairScores, *, beta: float, tau: float = 0.05) -> Float[Tensor, " B"]:
    """DiscoPOP: (1 - k) L(x) + k e^(-x), k = s(x / t), x = b h - m.

    Lu et al. 2024 (2406.08414) Eq. 5, the log-ratio modulated loss that a language model found. Not
    convex. Beyond e^30 the exponential goes on along its tangent, so that it stays finite.

    Args:
        scores: B pairs.
        beta: strength of the KL to the reference.
        tau: t > 0, how fast the blend changes from logistic to exponential.

    Returns:
        (B,) per-pair losses; (1 + ln 2) / 2 where policy = reference and m = 0.

    Raises:
        ConfigError: for tau not above 0.
    """
    within("(0, inf)", "discopop", tau=tau)
    x = scores.logit(beta)
    blend = torch.sigmoid(x / tau)
    return (1 - blend) * softplus(-x) + blend * capped_exp(-x)


_LAWS = frozenset({"step0", "swap", "shift", "scaling", "ratio", "batch", "p_chosen", "weight"})

ROWS = (
    PairLoss(
        name="sigmoid",
        function=sigmoid,
        paper="Rafailov et al. 2023, Direct Preference Optimization, arXiv:2305.18290, Eq. 7",
        equation="(1-e) L(b h - m) + e L(-b h - m)",
        betas=betas(),
        laws=_LAWS,
        golden=Golden(0.1, 0.6209570),
        minimiser="h* = logit((1-e) p + e (1-p)) / b",
        at_reference=lambda beta: math.log(2),
    ),
    PairLoss(
        name="robust",
        function=robust,
        paper="Chowdhury et al. 2024, Provably Robust DPO, arXiv:2403.00409, Eq. 12",
        equation="[(1-e) L(b h - m) - e L(-b h - m)] / (1 - 2e)",
        betas=betas(),
        laws=_LAWS,
        golden=Golden(0.1, 0.6022070),
        minimiser="h* = logit(p)/b for labels flipped with probability e",
        at_reference=lambda beta: math.log(2),
    ),
    PairLoss(
        name="hinge",
        function=hinge,
        paper="Zhao et al. 2023, SLiC-HF, arXiv:2305.10425; Liu et al. 2023, RSO, arXiv:2309.06657",
        equation="max(0, 1 - (b h - m))",
        betas=betas(),
        laws=_LAWS,
        golden=Golden(0.1, 0.85),
        minimiser="h* = 1/b for any p > 1/2",
        at_reference=lambda beta: 1.0,
    ),
    PairLoss(
        name="ipo",
        function=ipo,
        paper="Azar et al. 2023, A General Theoretical Paradigm, arXiv:2310.12036, Eq. 17",
        equation="(w/|y_w| - l/|y_l| - m/b - 1/(2b))^2; average=False: (h - m/b - 1/(2b))^2",
        betas=betas(),
        # Averages over two different lengths: what both answers gain alike does not cancel.
        laws=_LAWS - {"shift"},
        golden=Golden(0.1, 22.4439062),
        minimiser="h* = (p - 1/2)/b, of sums or of averages",
        at_reference=lambda beta: 1 / (4 * beta**2),
        needs=("chosen_length", "rejected_length"),
    ),
    PairLoss(
        name="exo_pair",
        function=exo_pair,
        paper="Ji et al. 2024, Efficient Exact Optimization, arXiv:2402.00856, Eq. 16",
        equation="s(x) [ln s(x) - ln(1-e)] + s(-x) [ln s(-x) - ln e], x = b h - m",
        betas=betas(),
        laws=_LAWS,
        golden=Golden(0.1, 2.5055166),
        minimiser="h* = (2p - 1) ln((1-e)/e) / b",
        at_reference=lambda beta: -math.log(2) - math.log(0.999e-3) / 2,
    ),
    PairLoss(
        name="discopop",
        function=discopop,
        paper="Lu et al. 2024, Discovering Preference Optimization, arXiv:2406.08414, Eq. 5",
        equation="(1-k) L(x) + k e^(-x), k = s(x/t), x = b h - m",
        betas=betas(),
        laws=_LAWS,
        golden=Golden(0.1, 0.8493376),
        minimiser="none in closed form; two valleys, not convex",
        at_reference=lambda beta: (math.log(2) + 1) / 2,
    ),
)
