"""Pairwise preference losses: pure functions of four log-likelihoods per pair.

Symbols: w = log-ratio of policy to reference on the chosen answer, l = on the rejected one, h = w
- l the margin, m = `target_margin`, L(x) = -log sigmoid(x) = softplus(-x). All return (B,),
unreduced and unweighted; means over the batch are the objective's affair, *outside* the
log-sigmoid.

What these functions cannot check: that policy and reference saw the same tokens, the same draw,
and no dropout. The law "policy = reference gives margin 0" does.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from alignkit.errors import ConfigError
from alignkit.losses.defaults import betas
from alignkit.losses.scores import PairScores, needed
from alignkit.losses.table import Golden, PairLoss


def _logit(scores: PairScores, beta: float) -> Float[Tensor, " B"]:
    """b h - m: the logit that every margin loss is a function of."""
    logit = beta * scores.margin
    return logit if scores.target_margin is None else logit - scores.target_margin


def _swapped_logit(scores: PairScores, beta: float) -> Float[Tensor, " B"]:
    """-b h - m: the logit of the same pair with the opposite label."""
    logit = -beta * scores.margin
    return logit if scores.target_margin is None else logit - scores.target_margin


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
    if not 0 <= label_smoothing <= 0.5:
        raise ConfigError(f"label_smoothing must be in [0, 0.5]; got {label_smoothing}.")
    loss = softplus(-_logit(scores, beta))
    if label_smoothing == 0:
        return loss
    swapped = softplus(-_swapped_logit(scores, beta))
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
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(
            f"label_smoothing of 'robust' is a flip probability in [0, 0.5); got {label_smoothing}."
        )
    loss = softplus(-_logit(scores, beta))
    swapped = softplus(-_swapped_logit(scores, beta))
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
    return (1 - _logit(scores, beta)).clamp(min=0)


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
)
