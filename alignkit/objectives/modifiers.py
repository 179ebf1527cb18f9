"""Modifiers: changes of a preference objective that go with (almost) every loss.

Each acts at one place: on the likelihoods (LD-DPO), on the gradient of the scores (the safeguard),
on a pair's weight (WPO), or as a term of its own (the anchor).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alignkit.batches import Batch, Likelihood, Metrics
from alignkit.losses.modifiers import (
    anchor_loss,
    damped,
    safeguard_factor,
    without_surplus,
    wpo_weight,
)

PUBLIC, ALIGNMENT, OVERLAP, ERROR = "public", "alignment", "overlap", "error"
ROUTER = "router"
"""Extras of `Likelihood`, see there."""


@dataclass(frozen=True)
class Modifiers:
    """What changes an objective besides its loss; the defaults change nothing.

    The formulas and their papers are in `alignkit.losses.modifiers`.

    Attributes:
        ld_alpha: LD-DPO: log-likelihoods are those of the first tokens, as many as the shortest
            answer of the group has, plus ld_alpha times the rest's. None is 1.
        wpo: WPO: a pair's loss counts as much as the policy would write the pair itself. It weighs
            the loss and leaves the number that sums are divided by.
        anchor: weight of the negative log-likelihood per token of the chosen answer.
        safeguard: SDPO: mu in [0, 1).
        router: weight of the load-balancing loss of the policy's experts. It belongs to a whole
            micro-batch, and is averaged over them by their rows' weights.
    """

    ld_alpha: float | None = None
    wpo: bool = False
    anchor: float = 0.0
    safeguard: float | None = None
    router: float = 0.0

    @property
    def of_both(self) -> frozenset[str]:
        """Extras needed of policy and reference."""
        return frozenset() if self.ld_alpha is None else frozenset({PUBLIC})

    @property
    def of_policy(self) -> frozenset[str]:
        """Extras needed of the policy."""
        wpo = {ALIGNMENT} if self.wpo else set()
        safeguard = set() if self.safeguard is None else {OVERLAP, ERROR}
        router = {ROUTER} if self.router else set()
        return self.of_both | wpo | safeguard | router

    def likelihood(self, found: Likelihood) -> Likelihood:
        """With the tokens beyond the public length down-weighted."""
        if self.ld_alpha is None:
            return found
        total = without_surplus(found.total, found.extras[PUBLIC], self.ld_alpha)
        return replace(found, total=total)

    def guarded(self, scores: Any, batch: Batch, policy: Likelihood) -> tuple[Any, Metrics]:
        """The same numbers, with the rejected image's gradient held back."""
        if self.safeguard is None:
            return scores, {}
        chosen, rejected = (index.to(policy.total.device) for index in batch.pairs())
        own, shared = policy.extras[ERROR][chosen], policy.extras[OVERLAP][rejected]
        factor = safeguard_factor(own, shared, self.safeguard)
        guarded = replace(scores, policy_rejected=damped(scores.policy_rejected, factor))
        return guarded, {"safeguard/factor": mean(factor, batch.weights())}

    def factor(self, batch: Batch, policy: Likelihood) -> Tensor | None:
        """(G,) what each pair's loss counts, or None."""
        if not self.wpo:
            return None
        alignment = policy.extras[ALIGNMENT]
        chosen, rejected = (index.to(alignment.device) for index in batch.pairs())
        return wpo_weight(alignment[chosen], alignment[rejected])

    def own_term(self, scores: Any, batch: Batch, policy: Likelihood) -> Tensor | None:
        """(G,) what is added to the losses: the anchor's term and the routers', or None."""
        anchor = self.anchor * anchor_loss(scores) if self.anchor else None
        if not self.router:
            return anchor
        router = self.router * policy.extras[ROUTER][: batch.num_groups]
        return router if anchor is None else anchor + router


def mean(value: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weighted mean as a metric: (sum, sum of weights)."""
    weight = weight.to(value.device, torch.float64)
    return (value.double() * weight).sum(), weight.sum()
