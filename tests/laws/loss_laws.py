"""The laws that a row of a loss table may claim, for pairs, rankings and single answers.

A law takes a row, scores, beta and a number, and returns two sides that shall be equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alignkit.losses import GroupScores, PairScores

Sides = tuple[Tensor, Tensor]
Law = Callable[[Any, Any, float, float], Sides]

ANSWERS = {
    "PairScores": (
        ("policy_chosen", "reference_chosen"),
        ("policy_rejected", "reference_rejected"),
    ),
    "GroupScores": (("policy", "reference"),),
    "UnpairedScores": (("policy", "reference"),),
}
"""(policy, reference) fields of each answer of an example."""


def answers(scores: Any) -> tuple[tuple[str, str], ...]:
    return ANSWERS[type(scores).__name__]


def size(scores: Any) -> int:
    return len(getattr(scores, answers(scores)[0][0]))


def rows_of(scores: Any, index: list[int]) -> Any:
    """The same kind of scores with the given examples only, in the order given."""
    return replace(scores, **{k: None if v is None else v[index] for k, v in vars(scores).items()})


def step0(row: Any, scores: Any, beta: float, c: float) -> Sides:
    """Policy = reference costs what the row says: of pairs, of two answers, of the two classes.

    Each example alone, or the mean of a batch that is coupled.
    """
    still = {policy: getattr(scores, reference) for policy, reference in answers(scores)}
    if isinstance(scores, PairScores):
        one = torch.ones_like(scores.policy_chosen)
        neutral = {"target_margin": None, "score_chosen": one, "score_rejected": 0 * one}
        found = row(replace(scores, **still, **neutral), beta=beta)
    elif isinstance(scores, GroupScores):
        two = torch.arange(2).expand(len(scores.rank), 2)
        pair = {k: v[:, :2] for k, v in vars(scores).items() if v is not None and v.ndim == 2}
        pair |= {"policy": pair["reference"], "rank": two, "mask": torch.ones_like(two).bool()}
        found = row(replace(scores, **pair), beta=beta)
    else:
        zero = torch.zeros_like(scores.policy)
        classes = [
            row(replace(scores, **still, kl=zero, desirable=torch.full_like(zero, d)), beta=beta)
            for d in (0, 1)
        ]
        found = (classes[0] + classes[1]) / 2
    found = found.mean() if row.coupled else found
    return found, torch.full_like(found, row.at_reference(beta))


def swap(row: Any, scores: Any, beta: float, c: float) -> Sides:
    """The opposite label with the opposite probability is the same pair."""
    q = scores.p_chosen
    other = replace(
        scores,
        policy_chosen=scores.policy_rejected,
        policy_rejected=scores.policy_chosen,
        reference_chosen=scores.reference_rejected,
        reference_rejected=scores.reference_chosen,
        chosen_length=scores.rejected_length,
        rejected_length=scores.chosen_length,
        p_chosen=1 - q,
    )
    return row(scores, beta=beta), row(other, beta=beta)


def shift(row: Any, scores: Any, beta: float, c: float) -> Sides:
    """What all answers of one example gain alike changes nothing."""
    by = c * torch.linspace(1, 2, size(scores)).double()
    by = by.reshape(-1, *[1] * (getattr(scores, answers(scores)[0][0]).ndim - 1))
    moved = {policy: getattr(scores, policy) + by for policy, _ in answers(scores)}
    return row(scores, beta=beta), row(replace(scores, **moved), beta=beta)


def ratio(row: Any, scores: Any, beta: float, c: float) -> Sides:
    """Policy and reference enter by their ratio only, answer by answer."""
    moved = {}
    for i, (policy, reference) in enumerate(answers(scores)):
        by = c * torch.linspace(1, 2 + i, size(scores)).double()
        by = by.reshape(-1, *[1] * (getattr(scores, policy).ndim - 1))
        if by.ndim == 2:
            by = by * torch.arange(1, getattr(scores, policy).shape[1] + 1)
        moved |= {name: getattr(scores, name) + by for name in (policy, reference)}
    return row(scores, beta=beta), row(replace(scores, **moved), beta=beta)


def scaling(row: Any, scores: Any, beta: float, c: float) -> Sides:
    """A function of beta * log-likelihoods, up to the factor that it has at the reference too."""
    k = 1 + abs(c)
    names = [name for pair in answers(scores) for name in pair]
    names += ["kl"] if getattr(scores, "kl", None) is not None else []
    scaled = replace(scores, **{name: getattr(scores, name) * k for name in names})
    factor = row.at_reference(beta) / row.at_reference(beta / k) if row.at_reference else 1.0
    return row(scores, beta=beta), factor * row(scaled, beta=beta / k)


def batch(row: Any, scores: Any, beta: float, c: float) -> Sides:
    """A batch is its examples, whatever the order."""
    num = size(scores)
    singles = torch.cat([row(rows_of(scores, [i]), beta=beta) for i in range(num)])
    backwards = row(rows_of(scores, [*reversed(range(num))]), beta=beta).flip(0)
    whole = row(scores, beta=beta)
    return torch.cat([whole, backwards]), torch.cat([singles, singles])


def p_chosen(row: Any, scores: Any, beta: float, c: float) -> Sides:
    """q mixes the loss of the pair with the loss of the pair with the opposite label."""
    q = scores.p_chosen
    sure = row(replace(scores, p_chosen=None), beta=beta)
    opposite = row(replace(scores, p_chosen=torch.zeros_like(q)), beta=beta)
    return row(scores, beta=beta), q * sure + (1 - q) * opposite


def weight(row: Any, scores: Any, beta: float, c: float) -> Sides:
    """Weight 0 is "row absent", weight 2 "row twice", in the weighted sum of the batch."""
    num = size(scores)
    weights = [(1, 2, 0)[i % 3] for i in range(num)]
    weighted = replace(scores, weight=torch.tensor(weights).double())
    repeated = rows_of(scores, [i for i in range(num) for _ in range(weights[i])])
    total = (row(weighted, beta=beta) * weighted.weight).sum()
    return total, row(repeated, beta=beta).sum()


LAWS: dict[str, Law] = {
    law.__name__: law for law in (step0, swap, shift, ratio, scaling, batch, p_chosen, weight)
}
PAIRS_ONLY = {"swap", "p_chosen"}
