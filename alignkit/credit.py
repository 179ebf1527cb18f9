"""From what a rollout found to what each token is credited with, by the options of a method.

The order is fixed, so that no weight depends on a scale: scores are normalised, clipped, given to
the answers that have ended, and then the KL is taken off. All of it is done on the whole rollout,
on every process alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.losses.advantages import (
    discounted_returns,
    explained_variance,
    gae,
    group_normalised,
    leave_one_out,
    shape_rewards,
)
from alignkit.losses.masked import masked_mean, whiten
from alignkit.methods import PolicyGradient
from alignkit.running import RunningMoments, clip_scores

CUT_SCORE = 1.0
"""What a cut answer loses under truncation="penalty", if nothing else is said."""


@dataclass(frozen=True)
class Looked:
    """What is known of a rollout's N answers, all of them, on the CPU.

    Attributes:
        scores: (N,), NaN where missing.
        ended: (N,) bool; the others were cut.
        mask: (N, T) bool, real tokens.
        old_logps, reference_logps: (N, T); the latter None without a reference.
        values: (N, T) or None.
        final_values: (N,) of the state after the last token, or None.
        entropy: (N, T) of the next token's distribution, or None.
        samples: answers to each prompt, which stand together.
    """

    scores: Tensor
    ended: Tensor
    mask: Tensor
    old_logps: Tensor
    reference_logps: Tensor | None = None
    values: Tensor | None = None
    final_values: Tensor | None = None
    entropy: Tensor | None = None
    samples: int = 1

    def log_ratios(self) -> Tensor:
        """(N, T) policy minus reference, 0 where masked or without a reference."""
        if self.reference_logps is None:
            return torch.zeros_like(self.old_logps)
        return torch.where(self.mask, self.old_logps - self.reference_logps, 0.0)


@dataclass(frozen=True)
class Credit:
    """Attributes:
    mask: (N, T) tokens that are learned from: none of an answer whose score is missing.
    advantages: (N, T).
    returns: (N, T) what the critic should say; None without one.
    answers: name -> (N,), measured.
    phase: name -> a number of the rollout.
    """

    mask: Tensor
    advantages: Tensor
    returns: Tensor | None
    answers: Mapping[str, Tensor]
    phase: Mapping[str, float]


def credit(
    method: PolicyGradient, looked: Looked, kl_coef: float, running: RunningMoments | None
) -> Credit:
    """Advantages and returns of a rollout.

    Args:
        method: its options.
        looked: the rollout.
        kl_coef: as it is now.
        running: the scores' scale so far, moved here; None leaves scores as they are.
    """
    scores, beyond = settled_scores(method, looked, running)
    present = ~scores.isnan()
    mask = looked.mask & present[:, None]
    in_reward = method.kl_mode == "reward_k1"
    rewards = shape_rewards(
        scores.nan_to_num(), looked.log_ratios(), mask, kl_coef=kl_coef if in_reward else 0.0
    )
    if getattr(method, "whiten_rewards", False):
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = CREDITS[method.credit](method, rewards, mask, looked)
    phase = {}
    if returns is not None and looked.values is not None:
        phase["critic/explained_variance"] = float(explained_variance(looked.values, returns, mask))
        phase["objective/returns"] = float(masked_mean(returns, mask))
    if getattr(method, "whiten_advantages", False):
        advantages = whiten(advantages, mask)
    answers = {
        "objective/rewards": torch.where(present, rewards.sum(-1), torch.nan),
        **({} if method.score_clip is None else {"objective/scores_clipped": beyond}),
    }
    return Credit(mask, advantages, returns, answers, phase)


def settled_scores(
    method: PolicyGradient, looked: Looked, running: RunningMoments | None
) -> tuple[Tensor, Tensor]:
    """(N,) the scores that answers are given, and 1 where they were clipped.

    An answer that was cut has not ended: "bootstrap" gives it no score (0), since what the whole of
    it would score is what the critic's final value stands for; "penalty" a fixed one; "as_end" its
    own.
    """
    scores = looked.scores
    if running is not None:
        running.update(scores)
        scores = running.normalise(scores)
    scores, beyond = clip_scores(scores, method.score_clip)
    cut = ~looked.ended
    penalty = method.missing_eos_penalty
    if method.truncation == "penalty":
        fixed = -(CUT_SCORE if penalty is None else penalty)
        return torch.where(cut, fixed, scores), beyond
    if method.truncation == "bootstrap":
        scores = torch.where(cut, 0.0, scores)
    return scores - cut * (penalty or 0.0), beyond


Advantages = tuple[Tensor, Tensor | None]


def _gae(method: Any, rewards: Tensor, mask: Tensor, looked: Looked) -> Advantages:
    assert looked.values is not None
    bootstrap = None
    if method.truncation == "bootstrap" and looked.final_values is not None:
        bootstrap = torch.where(looked.ended, 0.0, looked.final_values)
    return gae(
        rewards, looked.values, mask, gamma=method.gamma, lam=method.lam, bootstrap=bootstrap
    )


def _reinforce(method: Any, rewards: Tensor, mask: Tensor, looked: Looked) -> Advantages:
    """Returns to go, less the mean return of the rollout's other answers."""
    returns = discounted_returns(rewards, mask, gamma=method.gamma)
    present, whole = mask.any(-1), returns[:, :1]
    apart = leave_one_out(whole.T, present[None]).T  # R_i - mean of the others
    alone = present.sum() < 2
    baseline = whole if alone else whole - apart
    return torch.where(mask, returns - baseline, 0.0), None


def _leave_one_out(method: Any, rewards: Tensor, mask: Tensor, looked: Looked) -> Advantages:
    return _of_groups(leave_one_out, rewards, mask, looked), None


def _group(method: Any, rewards: Tensor, mask: Tensor, looked: Looked) -> Advantages:
    def normalised(scores: Tensor, present: Tensor) -> Tensor:
        return group_normalised(scores, present, divide=method.scale_advantages)

    return _of_groups(normalised, rewards, mask, looked), None


def _of_groups(
    baseline: Callable[[Tensor, Tensor], Tensor], rewards: Tensor, mask: Tensor, looked: Looked
) -> Tensor:
    """Of answers as single actions: one advantage, the same in all tokens."""
    shape = (-1, looked.samples)
    found = baseline(rewards.sum(-1).view(shape), mask.any(-1).view(shape))
    return torch.where(mask, found.reshape(-1, 1), 0.0)


CREDITS: Mapping[str, Callable[[Any, Tensor, Tensor, Looked], Advantages]] = {
    "gae": _gae,
    "reinforce": _reinforce,
    "leave_one_out": _leave_one_out,
    "group": _group,
}
"""Name -> (method, rewards, mask, rollout) -> advantages, and returns for a critic."""
