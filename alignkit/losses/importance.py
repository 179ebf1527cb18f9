"""Corrections for answers that another engine sampled than the one that learns from them.

An engine for inference computes in other kernels and precisions than the trainer, so that the same
weights give other probabilities. What was sampled from q is weighed as if it were from p.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from alignkit.losses.masked import masked_mean, only

LIMIT = 20.0
"""Of a log-ratio that is exponentiated."""


@torch.no_grad()
def truncated_importance(
    policy_logps: Float[Tensor, "N T"],
    sampler_logps: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    cap: float = 2.0,
    band: tuple[float, float] | None = (0.5, 2.0),
) -> Float[Tensor, "N T"]:
    """w_t = min(p(token_t) / q(token_t), cap), what a token's advantage is multiplied by.

    Truncated importance sampling (Ionides 2008; for language models Yao et al. 2025). Without a cap
    the weighted mean is that under p, at a variance that rare large ratios carry; the cap trades a
    bias for it. An answer whose geometric mean ratio exp(mean_t ln p/q) is outside the band came
    from something else than a rounding of the policy, and weighs 0.

    Args:
        policy_logps: of the sampled tokens under the policy as it was, by the trainer.
        sampler_logps: the same tokens under the distribution they were drawn from.
        mask: real tokens.
        cap: above it weights are cut.
        band: least and greatest geometric mean ratio of an answer; None keeps all.

    Returns:
        Weights, 0 where masked.
    """
    ratio = only(policy_logps.float() - sampler_logps.float(), mask).clamp(-LIMIT, LIMIT)
    weights = ratio.exp().clamp(max=cap)
    kept = mask
    if band is not None:
        mean = masked_mean(ratio, mask, dim=-1).exp()
        kept = mask & ((mean >= band[0]) & (mean <= band[1]))[:, None]
    return only(weights, kept)


@torch.no_grad()
def mismatch(
    policy_logps: Float[Tensor, "N T"],
    sampler_logps: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
) -> dict[str, Tensor]:
    """How far the sampler is from the policy, per token: a mean near 0 hides large single ones.

    "mismatch/mean", "mismatch/p95" and "mismatch/max" of abs(ln p - ln q); "mismatch/kl", the mean
    of ln q - ln p, which estimates KL(q || p). All 0 without a token.
    """
    apart = (policy_logps.float() - sampler_logps.float())[mask]
    if len(apart) == 0:
        apart = apart.new_zeros(1)
    size = apart.abs()
    return {
        "mismatch/mean": size.mean(),
        "mismatch/p95": size.quantile(0.95),
        "mismatch/max": size.max(),
        "mismatch/kl": -apart.mean(),
    }
