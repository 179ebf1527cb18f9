"""The kinds of rows: how likelihoods of N answers become the scores that losses take, and what is
reported of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.batches import Batch, Likelihood, Metrics
from alignkit.errors import DataError
from alignkit.losses import GroupScores, PairScores, UnpairedScores

Scores = PairScores | GroupScores | UnpairedScores


@dataclass(frozen=True)
class Kind:
    """A kind of row.

    Attributes:
        rows: its name, as `Wing.examples` takes it.
        scores: `(batch, policy, reference, **fields) -> scores`; further fields are handed through.
        metrics: `(scores, beta, weight) -> metrics`, weighted sums and their weights.
        wants: extras of the policy's forward that `scores` takes.
        derived: `(means) -> metrics` of a held-out set, from the means of its metrics.
    """

    rows: str
    scores: Callable[..., Any]
    metrics: Callable[[Any, float, Tensor], Metrics]
    wants: frozenset[str] = frozenset()
    derived: Callable[[Mapping[str, float]], dict[str, float]] = lambda means: {}


def _given(value: Tensor | None, like: Tensor) -> Tensor | None:
    return None if value is None else value.to(like.device, torch.float32, non_blocking=True)


def _mean(value: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return (value.double() * weight).sum(), weight.sum()


# --- pairs -----------------------------------------------------------------------------------


def pair_scores(
    batch: Batch, policy: Likelihood, reference: Likelihood, **fields: Any
) -> PairScores:
    """Groups of two, with the data's modifiers."""
    total = policy.total
    chosen, rejected = (index.to(total.device, non_blocking=True) for index in batch.pairs())
    against = reference.total.to(total.device)
    score = _given(batch.score, total)
    return PairScores(
        total[chosen],
        total[rejected],
        against[chosen],
        against[rejected],
        chosen_length=policy.length[chosen],
        rejected_length=policy.length[rejected],
        target_margin=_given(batch.target_margin, total),
        p_chosen=_given(batch.p_chosen, total),
        score_chosen=None if score is None else score[chosen],
        score_rejected=None if score is None else score[rejected],
        **fields,
    )


@torch.no_grad()
def pair_metrics(scores: PairScores, beta: float, weight: Tensor) -> Metrics:
    """The field's preference metrics; ties count one half."""
    chosen, rejected, margin = scores.chosen, scores.rejected, scores.margin
    values = {
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/margins": beta * margin,
        "rewards/accuracies": (margin > 0) + 0.5 * (margin == 0),
        "logps/chosen": scores.policy_chosen,
        "logps/rejected": scores.policy_rejected,
        "log_ratio/chosen": chosen,
        "log_ratio/rejected": rejected,
    }
    return {name: _mean(value, weight) for name, value in values.items()}


# --- rankings --------------------------------------------------------------------------------


def group_scores(
    batch: Batch, policy: Likelihood, reference: Likelihood, **fields: Any
) -> GroupScores:
    """Groups of up to K, as rows of K places, empty ones masked."""
    device = policy.total.device
    sizes = torch.bincount(batch.group, minlength=batch.num_groups)
    places = torch.arange(int(sizes.max()))
    mask = places < sizes[:, None]  # (G, K)
    index = ((sizes.cumsum(0) - sizes)[:, None] + places).clamp(max=batch.num_answers - 1)
    rank = torch.where(mask, batch.rank[index], -1).to(device)
    index, mask = index.to(device), mask.to(device)

    def spread(values: Tensor, fill: float) -> Tensor:
        return torch.where(mask, values.to(device)[index], fill)

    return GroupScores(
        spread(policy.total, 0.0),
        spread(reference.total, 0.0),
        rank,
        mask,
        length=spread(policy.length, 1.0),
        **fields,
    )


@torch.no_grad()
def group_metrics(scores: GroupScores, beta: float, weight: Tensor) -> Metrics:
    """As for pairs: chosen is the best answer (the mean of several), rejected the mean of the rest;
    accuracy is over the decided pairs of a group.
    """
    best, rest = _best(scores), scores.mask & ~_best(scores)
    reward = beta * scores.log_ratio.double()

    def over(values: Tensor, where: Tensor) -> Tensor:
        return (values * where).sum(-1) / where.sum(-1).clamp(min=1)

    chosen, rejected = over(reward, best), over(reward, rest)
    place = torch.where(scores.rank < 0, scores.rank.shape[1], scores.rank)
    both = scores.mask[:, :, None] & scores.mask[:, None, :]
    above = both & (place[:, :, None] < place[:, None, :])
    gap = reward[:, :, None] - reward[:, None, :]
    right = ((gap > 0) + 0.5 * (gap == 0)) * above
    decided = above.sum((1, 2))
    accuracy = right.sum((1, 2)) / decided.clamp(min=1)
    values = {
        "rewards/chosen": _mean(chosen, weight),
        "rewards/rejected": _mean(rejected, weight),
        "rewards/margins": _mean(chosen - rejected, weight),
        "rewards/accuracies": _mean(accuracy, weight * (decided > 0)),
        "logps/chosen": _mean(over(scores.policy.double(), best), weight),
        "logps/rejected": _mean(over(scores.policy.double(), rest), weight),
        "log_ratio/chosen": _mean(over(scores.log_ratio.double(), best), weight),
        "log_ratio/rejected": _mean(over(scores.log_ratio.double(), rest), weight),
    }
    return values


def _best(scores: GroupScores) -> Tensor:
    """(G, K) bool, the answers of the best rank."""
    last = scores.rank.shape[1]
    place = torch.where((scores.rank < 0) | ~scores.mask, last, scores.rank)
    return scores.mask & (place == place.amin(-1, keepdim=True))


# --- single labelled answers -----------------------------------------------------------------


def unpaired_scores(
    batch: Batch, policy: Likelihood, reference: Likelihood, **fields: Any
) -> UnpairedScores:
    """Groups of one, with a label."""
    if batch.desirable is None or batch.num_answers != batch.num_groups:
        raise DataError(
            "A loss of single labelled answers needs rows with prompt, completion and label. For "
            "pairs take DPO(...)."
        )
    total = policy.total
    return UnpairedScores(
        total,
        reference.total.to(total.device),
        batch.desirable.to(total.device, non_blocking=True),
        length=policy.length,
        **fields,
    )


@torch.no_grad()
def unpaired_metrics(scores: UnpairedScores, beta: float, weight: Tensor) -> Metrics:
    """Rewards of liked answers (chosen) and disliked ones (rejected)."""
    liked = scores.desirable.bool()
    reward = beta * scores.log_ratio
    found: Metrics = {}
    for name, where in (("chosen", liked), ("rejected", ~liked)):
        found[f"rewards/{name}"] = _mean(reward, weight * where)
        found[f"logps/{name}"] = _mean(scores.policy, weight * where)
        found[f"log_ratio/{name}"] = _mean(scores.log_ratio, weight * where)
    if scores.kl is not None:
        found["objective/kl_baseline"] = _mean(scores.kl, weight)
    return found


PAIRS = Kind("pairs", pair_scores, pair_metrics)
GROUPS = Kind("groups", group_scores, group_metrics)
UNPAIRED = Kind("unpaired", unpaired_scores, unpaired_metrics)
