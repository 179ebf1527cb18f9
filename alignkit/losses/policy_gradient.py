"""Losses of answers that the policy wrote itself: one number per token in and out.

The objective adds them up over the tokens that count and divides once by their number in the global
batch. Shapes: N answers, T tokens, V vocabulary. Masked places come out as 0, whatever stood there.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import log_softmax

from alignkit.losses.kl import LIMIT, k3
from alignkit.losses.masked import only

ClipRange = float | tuple[float, float]
"""eps, or (below, above) where the two sides differ (DAPO: 0.2 and 0.28, 2503.14476)."""


def clipped_surrogate(
    logps: Float[Tensor, "N T"],
    old_logps: Float[Tensor, "N T"],
    advantages: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    clip_range: ClipRange = 0.2,
) -> tuple[Float[Tensor, "N T"], dict[str, Float[Tensor, "N T"]]]:
    """PPO: -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A), ratio = e^(logps - old_logps).

    Schulman et al. 2017 (1707.06347), eq. 7. At ratio 1 its gradient is that of `reinforce`.
    Log-ratios are held to +-20 before the exponential.

    Args:
        logps: of the sampled tokens, with gradient.
        old_logps: of the same tokens when they were sampled, at the same temperature and from the
            same arithmetic: the ratio of a first pass is exactly 1.
        advantages: of each token.
        mask: True for tokens of answers.
        clip_range: eps; infinity gives the importance-weighted policy gradient.

    Returns:
        (N, T) losses, and per token: "clipped", 1 where the clip took the gradient away; "ratio";
        "k3", the estimate of KL(old, new) that an early stop of the epochs goes by.
    """
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    moved = only(logps - old_logps, mask).clamp(-LIMIT, LIMIT)
    ratio, gain = moved.exp(), only(advantages.detach(), mask)
    plain, held = ratio * gain, ratio.clamp(1 - low, 1 + high) * gain
    losses = only(-torch.minimum(plain, held), mask)
    still = moved.detach()
    measured = {
        "clipped": (held < plain).to(losses.dtype).detach(),
        "ratio": ratio.detach(),
        # The old policy sampled: of KL(old, new) the log-ratio is old minus new.
        "k3": k3(-still),
    }
    return losses, {name: only(value, mask) for name, value in measured.items()}


def reinforce(
    logps: Float[Tensor, "N T"], advantages: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]
) -> Float[Tensor, "N T"]:
    """The policy gradient: -A ln p, of A2C and REINFORCE.

    Williams 1992; Mnih et al. 2016 (1602.01783). Right only for answers of the present policy: one
    pass per rollout.

    Args:
        logps: of the sampled tokens, with gradient.
        advantages: of each token; where the answer is one action, the same in all its tokens.
        mask: True for tokens of answers.
    """
    return only(-only(advantages.detach(), mask) * logps, mask)


def clipped_value_loss(
    values: Float[Tensor, "N T"],
    old_values: Float[Tensor, "N T"],
    returns: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    clip_range: float | None = 0.2,
) -> tuple[Float[Tensor, "N T"], dict[str, Float[Tensor, "N T"]]]:
    """1/2 max((V - ret)^2, (V_old + clip(V - V_old, -eps, eps) - ret)^2).

    The value clip of the code that came with Schulman et al. 2017; Ziegler et al. 2019 (1909.08593)
    for language. With scores far larger than eps it holds the critic back.

    Args:
        values: of the critic, with gradient.
        old_values: of the critic that looked at the rollout.
        returns: what it should have said.
        mask: True for tokens of answers.
        clip_range: eps; None is half the plain square.

    Returns:
        (N, T) losses, and per token "clipped", 1 where the clip took the gradient away.
    """
    target, old, now = (
        only(returns.detach(), mask),
        only(old_values.detach(), mask),
        only(values, mask),
    )
    plain = (now - target) ** 2
    if clip_range is None:
        return 0.5 * plain, {"clipped": torch.zeros_like(plain).detach()}
    held = (old + (now - old).clamp(-clip_range, clip_range) - target) ** 2
    return 0.5 * torch.maximum(plain, held), {"clipped": (held > plain).to(plain.dtype).detach()}


def entropy(logits: Float[Tensor, "*S V"]) -> Float[Tensor, "*S"]:
    """H = -sum_v p(v) ln p(v) of the next token, with gradient; a token of probability 0 adds 0.

    Args:
        logits: at the temperature that answers are sampled at, in float32 or wider.
    """
    logps = log_softmax(logits, -1)
    p = logps.exp()
    return -(p * torch.where(p > 0, logps, 0.0)).sum(-1)
