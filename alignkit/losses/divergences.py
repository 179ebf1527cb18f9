"""Which divergence holds the policy to the reference: a change of the log-ratio, before any loss.

Wang et al. 2023 (2309.16240): under a penalty by the f-divergence with derivative f', the reward of
the best policy is b f'(u) up to a constant of the prompt, u = policy / reference. So a loss of
differences of log-ratios holds for any of them once f'(u) stands where ln u stood. f' is shifted to
0 at u = 1, which no difference sees. All but reverse KL want log-ratios in nats.

    reverse_kl      ln u
    forward_kl      1 - 1/u
    js_divergence   ln(2u / (1 + u))
    alpha           (1 - u^-a) / a,  0 < a < 1: reverse KL as a -> 0, forward KL as a -> 1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import softplus

from alignkit.errors import ConfigError, refuse_unknown
from alignkit.losses.scores import GroupScores, PairScores
from alignkit.losses.table import Loss

CAP = 30.0
"""Largest exponent: e^30 squared is still a float32."""


def capped_exp(x: Tensor) -> Tensor:
    """e^x, going on along its tangent beyond e^30: finite, increasing, with a gradient."""
    beyond = (x - CAP).clamp(min=0)
    return (x - beyond).exp() * (1 + beyond)


def reverse_kl(log_ratio: Tensor, alpha: float = 0.5) -> Tensor:
    """ln u: the KL of DPO."""
    return log_ratio


def forward_kl(log_ratio: Tensor, alpha: float = 0.5) -> Tensor:
    """1 - 1/u."""
    return 1 - capped_exp(-log_ratio)


def js_divergence(log_ratio: Tensor, alpha: float = 0.5) -> Tensor:
    """ln(2u / (1 + u)) = ln 2 + ln s(ln u), the Jensen-Shannon divergence."""
    return math.log(2) - softplus(-log_ratio)


def alpha_divergence(log_ratio: Tensor, alpha: float = 0.5) -> Tensor:
    """(1 - u^-a) / a."""
    return (1 - capped_exp(-alpha * log_ratio)) / alpha


DIVERGENCES: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "reverse_kl": reverse_kl,
        "forward_kl": forward_kl,
        "js_divergence": js_divergence,
        "alpha": alpha_divergence,
    }
)
"""Name -> f' as a function of the log-ratio."""


def check_divergence(divergence: str, alpha: float, loss: Loss | None = None) -> None:
    """Raise `ConfigError` for a divergence that does not exist or has no meaning for the loss.

    Args:
        divergence: a name of `DIVERGENCES`.
        alpha: a of the alpha divergence.
        loss: the row; None for a function of the user's own, which is taken as it is.
    """
    refuse_unknown("divergence", divergence, DIVERGENCES)
    if divergence == "alpha" and not 0 < alpha < 1:
        raise ConfigError(
            f"alpha of the alpha divergence must be between 0 and 1; got {alpha}. Its limits are "
            "divergence='reverse_kl' (0) and 'forward_kl' (1)."
        )
    if divergence != "reverse_kl" and loss is not None and loss.no_divergence:
        raise ConfigError(
            f"Loss {loss.name!r} does not take divergence={divergence!r}: {loss.no_divergence}. "
            "Leave divergence out, or take a margin loss such as 'sigmoid'."
        )


def with_divergence(
    scores: PairScores | GroupScores, divergence: str, alpha: float = 0.5
) -> PairScores | GroupScores:
    """The same examples with f'(u) in place of ln u; reverse KL returns the scores themselves.

    The log-likelihoods under the policy become f'(u) and those under the reference 0. That is for
    the loss alone: metrics are taken from the scores themselves.
    """
    if divergence == "reverse_kl":
        return scores
    f = DIVERGENCES[divergence]
    if isinstance(scores, PairScores):
        return replace(
            scores,
            policy_chosen=f(scores.chosen, alpha),
            policy_rejected=f(scores.rejected, alpha),
            reference_chosen=torch.zeros_like(scores.reference_chosen),
            reference_rejected=torch.zeros_like(scores.reference_rejected),
        )
    zero = torch.zeros_like(scores.reference)
    return replace(scores, policy=f(scores.log_ratio, alpha), reference=zero)


@torch.no_grad()
def capped(log_ratio: Tensor, divergence: str, alpha: float = 0.5) -> Tensor:
    """Bool: where the exponent of the divergence passes its cap and the tangent stands in."""
    exponent = {"forward_kl": 1.0, "alpha": alpha}.get(divergence, 0.0)
    return -exponent * log_ratio > CAP
