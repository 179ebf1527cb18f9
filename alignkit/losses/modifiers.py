"""What can be combined with a loss: the mathematics alone, in the order in which it applies.

    1. without_surplus      on an answer's log-likelihood (text)
       timestep_weights     on an image's log-likelihood at its timestep (images)
    2. divergences.with_divergence   on the scores, for the loss alone
    3. damped(., safeguard_factor)   on the rejected answer's log-likelihood: its gradient (images)
    4. the loss, with `p_chosen` and `target_margin` of the data
    5. + anchor * anchor_loss
    6. the row's weight, times wpo_weight (text)

Weighted sums of losses are in mixture.py. Symbols as in preference.py.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from alignkit.errors import ConfigError, refuse_unknown
from alignkit.losses.ranges import within
from alignkit.losses.scores import GroupScores, PairScores, needed
from alignkit.losses.table import Loss

WEIGHTINGS = ("wpo",)
TIMESTEP_WEIGHTINGS = ("uniform", "min_snr", "elbo")


def check_weighting(weighting: str | None, loss: Loss | None = None) -> None:
    """Raise `ConfigError` for a weighting that does not exist or has no meaning for the loss."""
    if weighting is None:
        return
    refuse_unknown("weighting", weighting, WEIGHTINGS)
    if loss is not None and loss.coupled:
        raise ConfigError(
            f"Loss {loss.name!r} does not take weighting='wpo': it compares pairs with one another,"
            " and a weight of the policy's making would change the statistics that it is measured "
            "by. Leave weighting out, or take a loss such as 'sigmoid'."
        )


def token_alignment(
    token_logps: Float[Tensor, " T"], logits: Float[Tensor, "T V"]
) -> Float[Tensor, " T"]:
    """ln p(token) - ln sum_v p_v^2: how likely a token is, beside one drawn from the policy.

    The "sampled alignment" of Zhou et al. 2024 (2406.11827): the sum is the mean probability of a
    sampled token.

    Args:
        token_logps: ln p of each token.
        logits: what they were taken from.

    Returns:
        (T,) detached.
    """
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    squares = (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)
    return token_logps.detach() - squares


def wpo_weight(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """WPO: min(1, e^(A_w + A_l)), A = mean over an answer's tokens of `token_alignment`.

    Zhou et al. 2024 (2406.11827) Eq. 2: pairs that the policy would write itself weigh more. The
    weight multiplies the loss of the pair and is detached.
    """
    return (chosen + rejected).detach().exp().clamp(max=1)


def without_surplus(
    total: Float[Tensor, " N"], public: Float[Tensor, " N"], ld_alpha: float
) -> Float[Tensor, " N"]:
    """LD-DPO: the log-likelihood of an answer's first min(|y_w|, |y_l|) tokens, plus ld_alpha times
    that of the rest.

    Liu et al. 2024 (2409.06411): the surplus of the longer answer counts less, under policy and
    reference alike.

    Args:
        total: of all tokens.
        public: of the first ones, as many as the shortest answer of the group has.
        ld_alpha: in [0, 1]; 1 is plain DPO.

    Raises:
        ConfigError: for ld_alpha outside [0, 1].
    """
    within("[0, 1]", "LD-DPO", ld_alpha=ld_alpha)
    return public + ld_alpha * (total - public)


def anchor_loss(scores: PairScores | GroupScores) -> Float[Tensor, " B"]:
    """-p_w/|y_w|: the chosen answer's negative log-likelihood per token, of RPO's second term.

    Pang et al. 2024 (2404.19733). Under `p_chosen` q it is q of the chosen and 1 - q of the
    rejected answer; of a ranking, the mean over its best answers. Images have length 1.

    Returns:
        (B,) per pair or ranking, unweighted.

    Raises:
        ValueError: if the lengths are missing.
    """
    if isinstance(scores, GroupScores):
        (length,) = needed(scores, "length", by="anchor")
        place = torch.where(scores.rank < 0, scores.rank.shape[1], scores.rank)
        place = torch.where(scores.mask, place, scores.rank.shape[1] + 1)
        best = (place == place.amin(1, keepdim=True)) & scores.mask
        loss = torch.where(best, -scores.policy / length.clamp(min=1), 0.0)
        return loss.sum(1) / best.sum(1).clamp(min=1)
    (length,) = needed(scores, "chosen_length", by="anchor")
    loss = -scores.policy_chosen / length
    if scores.p_chosen is None:
        return loss
    (length,) = needed(scores, "rejected_length", by="anchor with p_chosen")
    return scores.p_chosen * loss - (1 - scores.p_chosen) * scores.policy_rejected / length


def safeguard_factor(
    winner: Float[Tensor, " B"], product: Float[Tensor, " B"], mu: float = 0.6
) -> Float[Tensor, " B"]:
    """SDPO: clip((1 - mu) g_w.g_w / g_w.g_l, 0, 1) where g_w.g_l > 0, else 1.

    Fu et al. 2025 (2511.03317): a step of g_w - factor g_l still lowers the winner's error, by at
    least mu of what its own gradient would. One factor per pair.

    Args:
        winner: g_w.g_w, g the gradient of an image's error with respect to the model's output.
        product: g_w.g_l.
        mu: the share of the winner's progress that is safe, in [0, 1].

    Returns:
        (B,) factors of the loser's gradient, detached.

    Raises:
        ConfigError: for mu outside [0, 1].
    """
    within("[0, 1]", "safeguard", mu=mu)
    opposed = product > 0
    factor = (1 - mu) * winner / torch.where(opposed, product, 1.0)
    return torch.where(opposed, factor.clamp(0, 1), 1.0).detach()


def damped(values: Tensor, factor: Tensor) -> Tensor:
    """The same values, with their gradient multiplied by `factor`."""
    return values.detach() + factor * (values - values.detach())


def elbo_weights(alphas_cumprod: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """(snr_{t-1} / snr_t - 1) / 2: the weight of |noise - prediction|^2 in the ELBO, in nats.

    Ho et al. 2020 (2006.11239) Eq. 12 with the posterior variance; 0 at t = 0, whose term is a
    likelihood of x_0 and no denoising error.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return torch.cat([snr.new_zeros(1), (snr[:-1] / snr[1:] - 1) / 2])


def timestep_weights(
    kind: str,
    alphas_cumprod: Float[Tensor, " T"],
    prediction_type: str = "epsilon",
    *,
    gamma: float = 5.0,
    clip_below: int = 10,
) -> Float[Tensor, " T"]:
    """Weights of an image's log-likelihood by timestep, of mean 1.

    "uniform": 1, as published. "min_snr": min(snr, gamma) / snr, Hang et al. 2023 (2303.09556).
    "elbo": the exact weights, those below `clip_below` held at its own, since the first ten
    timesteps would own the variance. Both are weights of the error of the noise; a velocity's
    error is that error over abar_t.

    Args:
        kind: "uniform", "min_snr" or "elbo".
        alphas_cumprod: abar_t, the share of signal power.
        prediction_type: "epsilon" or "v_prediction", what the errors are of.
        gamma: of min-SNR.
        clip_below: of the ELBO.

    Returns:
        (T,) float64.
    """
    refuse_unknown("timestep_weighting", kind, TIMESTEP_WEIGHTINGS)
    abar = _above_zero(alphas_cumprod)
    if kind == "uniform":
        return torch.ones_like(abar)
    if kind == "min_snr":
        snr = abar / (1 - abar)
        weights = (gamma / snr).clamp(max=1)
    else:
        weights = elbo_weights(abar)
        place = torch.arange(len(weights), device=weights.device).clamp(min=clip_below)
        weights = weights[place.clamp(max=len(weights) - 1)]
    weights = _of_error(weights, abar, prediction_type)
    return weights / weights.mean()


def nats_per_error(
    alphas_cumprod: Float[Tensor, " T"], elements: int, prediction_type: str = "epsilon"
) -> Float[Tensor, " T"]:
    """By timestep, what -log p rises by per unit of mean squared error: T D w_t, w of the ELBO.

    With one timestep drawn uniformly, -nats_per_error[t] * err is an unbiased estimate of the ELBO
    in nats, up to a constant that policy and reference share.

    Args:
        alphas_cumprod: abar_t.
        elements: D, channels times height times width of a latent.
        prediction_type: "epsilon" or "v_prediction".

    Returns:
        (T,) float64.
    """
    abar = _above_zero(alphas_cumprod)
    weights = _of_error(elbo_weights(abar), abar, prediction_type)
    return len(abar) * elements * weights


def _above_zero(alphas_cumprod: Tensor) -> Tensor:
    """In float64, a schedule that ends in pure noise just above it: weights of a velocity's error,
    a ratio times abar, then have their limit there.
    """
    return alphas_cumprod.double().clamp(min=1e-30)


def _of_error(weights: Tensor, abar: Tensor, prediction_type: str) -> Tensor:
    """Weights of the noise's error, turned into weights of the error that is measured."""
    refuse_unknown("prediction_type", prediction_type, ("epsilon", "v_prediction"))
    return weights if prediction_type == "epsilon" else weights * abar
