"""Losses without a reference: functions of the policy's own log-likelihoods.

Symbols: b = beta, p_w and p_l = log-likelihoods of the chosen and the rejected answer under the
policy, |y| = completion tokens, m = `target_margin`, L(x) = -log sigmoid(x). Nothing but these
terms holds the policy to where it started. None means anything in another unit than its own.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from alignkit.losses.defaults import betas
from alignkit.losses.ranges import within
from alignkit.losses.scores import PairScores, needed
from alignkit.losses.table import Beta, Golden, PairLoss


def slic(
    scores: PairScores, *, beta: float, delta: float = 3.0, lam: float = 0.1
) -> Float[Tensor, " B"]:
    """SLiC-HF: max(0, d + m - b (p_w - p_l)) - c p_w, d = delta, c = lam.

    Zhao et al. 2023 (2305.10425): calibrates log-likelihoods to the ranking, and keeps the chosen
    answer likely. The paper has b = 1.

    Args:
        scores: B pairs.
        beta: scale of the log-likelihoods.
        delta: the margin at which a pair stops to push.
        lam: weight of the summed negative log-likelihood of the chosen answer.

    Returns:
        (B,) per-pair losses.
    """
    within("[0, inf)", "slic", delta=delta, lam=lam)
    logit = scores.offset(beta * (scores.policy_chosen - scores.policy_rejected))
    return (delta - logit).clamp(min=0) - lam * scores.policy_chosen


def simpo(scores: PairScores, *, beta: float, gamma_ratio: float = 0.5) -> Float[Tensor, " B"]:
    """SimPO: L(b (p_w/|y_w| - p_l/|y_l| - g) - m), g = gamma_ratio.

    Meng et al. 2024 (2405.14734) Eq. 6: the reward is the mean log-likelihood per token, and the
    chosen answer shall be ahead by gamma = g b.

    Args:
        scores: B pairs with lengths.
        beta: scale of the rewards.
        gamma_ratio: g = gamma / beta, in nats per token.

    Returns:
        (B,) per-pair losses.

    Raises:
        ValueError: if the lengths are missing.
    """
    chosen, rejected = needed(scores, "chosen_length", "rejected_length", by="simpo")
    margin = scores.policy_chosen / chosen - scores.policy_rejected / rejected - gamma_ratio
    return softplus(-scores.offset(beta * margin))


def cpo(scores: PairScores, *, beta: float, cpo_alpha: float = 1.0) -> Float[Tensor, " B"]:
    """CPO: L(b (p_w - p_l) - m) - a p_w/|y_w|, a = cpo_alpha.

    Xu et al. 2024 (2401.08417) Eq. 3: DPO against a uniform reference, with the negative
    log-likelihood of the chosen answer per token.

    Args:
        scores: B pairs with lengths.
        beta: scale of the log-likelihoods.
        cpo_alpha: weight of the likelihood term.

    Returns:
        (B,) per-pair losses.

    Raises:
        ValueError: if the lengths are missing.
    """
    within("[0, inf)", "cpo", cpo_alpha=cpo_alpha)
    (length,) = needed(scores, "chosen_length", by="cpo")
    logit = scores.offset(beta * (scores.policy_chosen - scores.policy_rejected))
    return softplus(-logit) - cpo_alpha * scores.policy_chosen / length


def orpo(scores: PairScores, *, beta: float, lam: float = 0.1) -> Float[Tensor, " B"]:
    """ORPO: -p_w/|y_w| + c L(b (o_w - o_l) - m), o = x - ln(1 - e^x), x = p/|y|, c = lam.

    Hong et al. 2024 (2403.07691) Eq. 4 and 7: fine-tuning on the chosen answer plus the log odds
    ratio of the two mean token likelihoods. The paper has b = 1. x is held below -1e-7, where the
    odds are finite.

    Args:
        scores: B pairs with lengths.
        beta: scale of the log odds ratio.
        lam: weight of the odds ratio term.

    Returns:
        (B,) per-pair losses.

    Raises:
        ValueError: if the lengths are missing.
    """
    within("[0, inf)", "orpo", lam=lam)
    chosen, rejected = needed(scores, "chosen_length", "rejected_length", by="orpo")
    mean = scores.policy_chosen / chosen
    logit = scores.offset(beta * (_log_odds(mean) - _log_odds(scores.policy_rejected / rejected)))
    return lam * softplus(-logit) - mean


def _log_odds(x: Tensor) -> Tensor:
    """ln(e^x / (1 - e^x)) of a mean log-likelihood."""
    x = x.clamp(max=-1e-7)
    return x - torch.log(-torch.expm1(x))


def mapo(
    scores: PairScores, *, beta: float, snr_scale: float = 0.5, timesteps: float = 1000.0
) -> Float[Tensor, " B"]:
    """MaPO: E_w + b L(T [f(E_w) - f(E_l)] - m), f(x) = c x / (e^(c x) - 1), E = -2 p.

    Hong et al. 2024 (2406.06424): E is the image's mean squared denoising error; the winner is
    fitted, and its odds over the loser are raised.

    Args:
        scores: B pairs of images, whose log-likelihoods are -E/2.
        beta: weight of the odds term.
        snr_scale: c, 0.5 in the authors' code.
        timesteps: T of the noise schedule.

    Returns:
        (B,) per-pair losses.
    """
    within("(0, inf)", "mapo", snr_scale=snr_scale, timesteps=timesteps)

    chosen, rejected = -2 * scores.policy_chosen, -2 * scores.policy_rejected
    logit = timesteps * (_excess(snr_scale * chosen) - _excess(snr_scale * rejected))
    return beta * softplus(-scores.offset(logit)) + chosen


def _excess(x: Tensor) -> Tensor:
    """x / (e^x - 1) - 1. Its differences are multiplied by 1000: for small x, where 1 would swallow
    them in float32, it is the series of the Bernoulli numbers."""
    x = x.clamp(max=80)
    series = -x / 2 + x**2 / 12 - x**4 / 720 + x**6 / 30240
    far = torch.where(x.abs() < 0.1, 1.0, x)
    return torch.where(x.abs() < 0.1, series, far / torch.expm1(far) - 1)


_LAWS = frozenset({"swap", "batch", "p_chosen", "weight"})
_NO_RATIO = "it has no reference, hence no ratio that a divergence could measure"

ROWS = (
    PairLoss(
        name="slic",
        function=slic,
        paper="Zhao et al. 2023, SLiC-HF, arXiv:2305.10425",
        equation="max(0, d + m - b (p_w - p_l)) - c p_w, d = delta, c = lam",
        betas=betas(
            1.0, "Zhao et al. 2023, where log-likelihoods stand as they are", scale_free=False
        ),
        laws=_LAWS,
        golden=Golden(1.0, 2.0),
        minimiser="diverges: the likelihood term has no bound in p_w",
        at_reference=None,
        needs_reference=False,
        scale_free=False,
        no_divergence=_NO_RATIO,
    ),
    PairLoss(
        name="simpo",
        function=simpo,
        paper="Meng et al. 2024, SimPO, arXiv:2405.14734, Eq. 6",
        equation="L(b (p_w/|y_w| - p_l/|y_l| - g) - m), g = gamma_ratio",
        betas=betas(2.0, "Meng et al. 2024: 2.0 to 2.5", scale_free=False),
        laws=_LAWS,
        golden=Golden(2.0, 2.1269280),
        minimiser="p_w/|y_w| - p_l/|y_l| of sigmoid with a target margin m + g b",
        at_reference=None,
        needs_reference=False,
        scale_free=False,
        needs=("chosen_length", "rejected_length"),
        no_divergence=_NO_RATIO,
    ),
    PairLoss(
        name="cpo",
        function=cpo,
        paper="Xu et al. 2024, Contrastive Preference Optimization, arXiv:2401.08417, Eq. 3",
        equation="L(b (p_w - p_l) - m) - a p_w/|y_w|, a = cpo_alpha",
        betas=betas(0.1, "Xu et al. 2024, as in TRL", scale_free=False),
        laws=_LAWS,
        golden=Golden(0.1, 2.5981389),
        minimiser="diverges: the likelihood term has no bound in p_w",
        at_reference=None,
        needs_reference=False,
        scale_free=False,
        needs=("chosen_length",),
        no_divergence=_NO_RATIO,
    ),
    PairLoss(
        name="orpo",
        function=orpo,
        paper="Hong et al. 2024, ORPO, arXiv:2403.07691, Eq. 4 and 7",
        equation="-p_w/|y_w| + c L(b (o_w - o_l) - m), o = x - ln(1 - e^x), x = p/|y|, c = lam",
        betas=betas(1.0, "Hong et al. 2024, where log odds stand as they are", scale_free=False),
        laws=_LAWS,
        golden=Golden(1.0, 2.1042058),
        minimiser="diverges: the likelihood term has no bound in p_w",
        at_reference=None,
        needs_reference=False,
        scale_free=False,
        needs=("chosen_length", "rejected_length"),
        no_divergence=_NO_RATIO,
    ),
    PairLoss(
        name="mapo",
        function=mapo,
        paper="Hong et al. 2024, Margin-aware Preference Optimization, arXiv:2406.06424",
        equation="E_w + b L(T [f(E_w) - f(E_l)] - m), f(x) = c x / (e^(c x) - 1), E = -2 p",
        betas={"image": Beta(0.1, "Hong et al. 2024, the authors' code")},
        laws=_LAWS,
        golden=Golden(0.1, 0.1577775),
        minimiser="diverges: E_w falls without bound in p_w",
        at_reference=None,
        needs_reference=False,
        scale_free=False,
        modalities=("image",),
        no_divergence=_NO_RATIO,
    ),
)
