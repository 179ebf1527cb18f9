"""Estimates of KL(policy || reference) from answers that the policy wrote, and what their gradients
are.

Schulman 2020, "Approximating KL divergence"; l = ln reference - ln policy of what was sampled:

    k1 = -l        k2 = l^2 / 2        k3 = e^l - 1 - l   (>= 0)

| | value | as a loss, gradient on the policy's own samples | in the reward |
|---|---|---|---|
| k1 | KL(policy, reference) | 0: nothing is learned | the gradient of KL(policy, reference) |
| k2 | biased | the gradient of KL(policy, reference) | a wrong direction |
| k3 | KL(policy, reference), calmer | the gradient of KL(reference, policy) | a wrong direction |

k3 times the ratio policy / sampler, with the ratio's gradient, is again KL(policy, reference) in
value and in gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from alignkit.errors import refuse_unknown
from alignkit.losses.masked import masked_sum

LIMIT = 20.0
"""Log-ratios are held to +-LIMIT before they become exponents: e^20 is 5e8."""


def k1(log_ratio: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """k1 = ln policy - ln reference. Unbiased; negative for single answers; no loss.

    Args:
        log_ratio: policy minus reference, of tokens or of whole answers.
    """
    return log_ratio


def k2(log_ratio: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """k2 = (ln policy - ln reference)^2 / 2. Its gradient is that of KL(policy, reference)."""
    return 0.5 * log_ratio**2


def k3(log_ratio: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """k3 = reference / policy - 1 + ln policy - ln reference. Unbiased and never negative.

    Log-ratios beyond +-20 are held there, without gradient.
    """
    held = log_ratio.clamp(-LIMIT, LIMIT)
    return torch.expm1(-held) + held


KL_ESTIMATES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"k1": k1, "k2": k2, "k3": k3}
)
"""Name -> estimate as a function of policy minus reference."""


def kl_estimate(
    kind: str, policy_logps: Float[Tensor, "..."], reference_logps: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """k1, k2 or k3 of each token, or of each answer where sums over its tokens are given.

    Args:
        kind: "k1", "k2" or "k3".
        policy_logps: log-likelihoods under the policy that sampled.
        reference_logps: under the reference.

    Returns:
        Estimates of the same shape, nats.

    Raises:
        ConfigError: for another kind.
    """
    refuse_unknown("KL estimate", kind, KL_ESTIMATES)
    return KL_ESTIMATES[kind](policy_logps - reference_logps)


def kl_loss(
    kind: str,
    logps: Float[Tensor, "N T"],
    old_logps: Float[Tensor, "N T"],
    reference_logps: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
) -> Float[Tensor, " N"]:
    """A KL as a loss: k2, or k3 weighted by the ratio to what sampled, of whole answers.

    The log-ratio is summed over the answer first. Taken token by token, a loss would hold each
    token to the reference without counting what its choice costs later: on the two-token tree of
    the proofs that optimum is 0.193 instead of 0.429 for the first token.

        k2:  (sum_t log_ratio_t)^2 / 2
        k3:  e^(sum_t logps_t - old_logps_t) k3(sum_t log_ratio_t)

    Both have the gradient of KL(policy, reference) on the policy's own answers. A loss of k1 has no
    gradient at all in the mean, and is refused.

    Args:
        kind: "k2" or "k3".
        logps: with gradient.
        old_logps: of the policy that sampled.
        reference_logps: of the reference.
        mask: True for tokens of answers.

    Returns:
        (N,) losses, to be meant over answers.

    Raises:
        ConfigError: for another kind.
    """
    refuse_unknown("KL that can be a loss", kind, ("k2", "k3"))
    log_ratio = masked_sum(logps - reference_logps, mask, -1)
    if kind == "k2":
        return k2(log_ratio)
    moved = masked_sum(logps - old_logps, mask, -1).clamp(-LIMIT, LIMIT)
    return moved.exp() * k3(log_ratio)
