"""From the scores of answers to what each token is credited with.

Shapes: N answers, T tokens (right-padded; the mask says which are real), G prompts with K answers.
`values[:, t]` is the value of the state before token t.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from alignkit.losses.masked import masked_mean, only

FLOOR = 1e-4
"""Of a group's standard deviation that is divided by."""


def last_token(mask: Bool[Tensor, "N T"]) -> Bool[Tensor, "N T"]:
    """True at the last real token of each answer, and nowhere in an answer without one."""
    later = mask.flip(-1).cumsum(-1).flip(-1)
    return mask & (later == 1)


def shape_rewards(
    scores: Float[Tensor, " N"],
    log_ratios: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    kl_coef: float,
) -> Float[Tensor, "N T"]:
    """rewards_t = -kl_coef (ln policy_t - ln reference_t) + [t is the last real token] score.

    Ziegler et al. 2019 (1909.08593), eq. 2, per token. The closing token counts as a token of the
    answer: the score stands on it, never one place later.

    Args:
        scores: from the reward, after normalising and clipping.
        log_ratios: policy minus reference of the sampled tokens (k1, the only estimate whose place
            in a reward gives the gradient of the KL).
        mask: True for tokens of answers.
        kl_coef: strength of the KL, per nat.

    Returns:
        (N, T) rewards, 0 where masked.
    """
    penalty = -kl_coef * only(log_ratios.detach(), mask)
    ends = last_token(mask)
    return penalty + torch.where(ends, scores.detach().to(penalty).unsqueeze(-1), 0.0)


def gae(
    rewards: Float[Tensor, "N T"],
    values: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
    """Generalised advantage estimation and the returns that a critic is trained on.

        delta_t = rewards_t + gamma V_{t+1} - V_t
        A_t     = delta_t + gamma lam A_{t+1};      returns = A + V

    Schulman et al. 2016 (1506.02438), eq. 16. lam 1 is the reward to go minus V; lam 0 is delta.

    Args:
        rewards: per token, by `shape_rewards`.
        values: of the state before each token, by the critic that looked at the rollout.
        mask: True for tokens of answers.
        gamma: discount per token.
        lam: how far credit reaches past the critic's next word.
        bootstrap: V after the last token: 0 for an answer that ended; what the critic says there
            for one that was cut, which has not (Pardo et al. 2018, 1712.00378). None is all 0.

    Returns:
        (N, T) advantages and returns, 0 where masked; detached.
    """
    rewards, values = only(rewards.detach(), mask), only(values.detach(), mask)
    start = rewards.new_zeros(len(rewards))
    next_value = start if bootstrap is None else bootstrap.detach().to(rewards)
    advantage, columns = start, []
    for t in reversed(range(rewards.shape[1])):
        real = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(real, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(real, values[:, t], next_value)
        columns.append(advantage)
    stacked = torch.stack(columns[::-1], 1) if columns else torch.zeros_like(rewards)
    advantages = only(stacked, mask)
    return advantages, advantages + values


def discounted_returns(
    rewards: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    gamma: float = 1.0,
    bootstrap: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, "N T"]:
    """Monte Carlo returns: G_t = rewards_t + gamma G_{t+1}, G after the last token `bootstrap`.

    Mnih et al. 2016 (1602.01783), with the step number up to the answer's end; the k1 penalties of
    *later* tokens are in it, without which a token is held to the reference by itself alone.

    Args:
        rewards: per token, by `shape_rewards`.
        mask: True for tokens of answers.
        gamma: discount per token.
        bootstrap: as in `gae`.

    Returns:
        (N, T), 0 where masked; detached.
    """
    zeros = torch.zeros_like(rewards)
    return gae(rewards, zeros, mask, gamma=gamma, lam=1.0, bootstrap=bootstrap)[0]


def explained_variance(
    values: Float[Tensor, "N T"], returns: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]
) -> Float[Tensor, ""]:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 a constant one; below 0 is
    worse than a constant.
    """
    spread = _variance(returns.double(), mask)
    return 1 - _variance(returns.double() - values.double(), mask) / spread.clamp(min=1e-12)


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def leave_one_out(
    scores: Float[Tensor, "G K"], present: Bool[Tensor, "G K"] | None = None
) -> Float[Tensor, "G K"]:
    """RLOO: A_i = R_i - mean of the other answers' R = K / (K - 1) (R_i - mean R).

    Kool et al. 2019; Ahmadian et al. 2024 (2402.14740), eq. 9. The whole answer is one action and R
    holds the KL: score - kl_coef (sum_t log_ratio_t).

    Args:
        scores: R of the K answers to each prompt.
        present: which answers have one; a missing score is left out, never 0. None is all.

    Returns:
        (G, K) advantages; 0 for an answer that is missing or alone.
    """
    kept, count, apart = _from_mean(scores, present)
    factor = count / (count - 1).clamp(min=1)
    return only(torch.where(count > 1, apart * factor, 0.0), kept).to(scores.dtype)


def group_normalised(
    scores: Float[Tensor, "G K"],
    present: Bool[Tensor, "G K"] | None = None,
    *,
    divide: bool = True,
) -> Float[Tensor, "G K"]:
    """GRPO: A_i = (R_i - mean R) / std R over the K answers to a prompt, the population's std.

    Shao et al. 2024 (2402.03300), section 4.1.2. Without the division: Dr. GRPO, Liu et al. 2025
    (2503.20783), whose advantages do not blow up near-ties.

    Args:
        scores: R of the K answers to each prompt.
        present: as in `leave_one_out`.
        divide: by the std, at least 1e-4.

    Returns:
        (G, K) advantages; a group of equal scores has zeros.
    """
    kept, count, apart = _from_mean(scores, present)
    if divide:
        std = ((apart**2).sum(-1, keepdim=True) / count.clamp(min=1)).sqrt()
        apart = apart / std.clamp(min=FLOOR)
    return only(apart, kept).to(scores.dtype)


def _from_mean(scores: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Which scores there are, how many of each prompt (G, 1), and how far from their mean."""
    x = scores.detach().double()
    kept = torch.ones_like(x, dtype=torch.bool) if present is None else present
    mean = masked_mean(x, kept, -1).unsqueeze(-1)
    return kept, kept.sum(-1, keepdim=True), only(x - mean, kept)
