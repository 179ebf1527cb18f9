"""Preference optimisation from pairs: likelihoods in, a summed loss and its metrics out.

One forward of policy and reference per micro-batch on a shared draw (alignkit.likelihood), four
numbers per pair into a pure loss (alignkit.losses), the weighted *sum* out. The trainer divides
once by the sum of weights over the global batch, so that no split into micro-batches or processes
changes a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.batches import Batch, Metrics
from alignkit.likelihood import log_likelihoods
from alignkit.losses.scores import PairScores
from alignkit.protocols import Backend, Key, Reference, Trainable

PairLossFunction = Callable[..., Tensor]
"""`(scores, *, beta) -> (B,)`."""


@dataclass(frozen=True)
class Micro:
    """A piece of a global batch and the key of its draws."""

    batch: Batch
    key: Key


class PreferenceObjective:
    """A pairwise loss on the log-ratios of policy to reference.

    Args:
        backend: evaluates the policy.
        reference: evaluates the frozen comparison.
        loss: `(scores, *, beta) -> (B,)`, its own keywords already bound.
        beta: strength of the KL, in the unit of the wing's log-ratio.
        seed: of the draws.
        budget: groups per micro-batch, or "auto".
    """

    requires: frozenset[str] = frozenset()

    def __init__(
        self,
        backend: Backend,
        reference: Reference,
        loss: PairLossFunction,
        *,
        beta: float,
        seed: int = 0,
        budget: int | str = "auto",
    ) -> None:
        self.backend = backend
        self.reference = reference
        self.loss = loss
        self.beta = beta
        self.seed = seed
        self.budget = budget

    @property
    def trainable(self) -> Trainable:
        def replace(name: str, module: torch.nn.Module) -> None:
            self.backend.module = module

        return Trainable({"policy": self.backend.module}, replace)

    def prepare(self, runtime: Any) -> None:
        self.reference.prepare(runtime)

    def normaliser(self, batch: Batch) -> Tensor:
        return batch.weights().double().sum()

    def micro_batches(self, batch: Batch, step: int) -> Iterator[Micro]:
        present = batch.weights().nonzero().flatten().tolist()
        if not present:
            batch = batch.select([0])
        elif len(present) < batch.num_groups:
            batch = batch.select(present)
        for piece in self.backend.split(batch, self.budget):
            yield Micro(piece, (self.seed, step))

    def absent(self, micro: Micro) -> Micro:
        return Micro(micro.batch.select([0]).absent(), micro.key)

    def rows_of(self, micro: Micro) -> list[int]:
        return micro.batch.row_id.tolist()

    def __call__(self, micro: Micro) -> tuple[Tensor, Metrics]:
        scores = self.scores(micro)
        losses = self.loss(scores, beta=self.beta)  # (B,)
        if losses.shape != scores.policy_chosen.shape:
            raise ValueError(
                "A preference loss returns one value per pair, unreduced; got shape "
                f"{tuple(losses.shape)} for {len(scores.policy_chosen)} pairs."
            )
        weight = _weight(scores).double()
        # Summed in float64: the mean of a large batch keeps the last bits of its members.
        total = (losses.double() * weight).sum()
        return total, _metrics(scores, self.beta, weight)

    def scores(self, micro: Micro) -> PairScores:
        """The four log-likelihoods of each pair of a micro-batch, with the data's modifiers."""
        batch = micro.batch
        policy, reference = log_likelihoods(
            self.backend, self.reference, batch, micro.key, self.requires
        )
        device = policy.total.device
        chosen, rejected = (index.to(device, non_blocking=True) for index in batch.pairs())
        reference_total = reference.total.to(device)

        def given(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, torch.float32, non_blocking=True)

        return PairScores(
            policy.total[chosen],
            policy.total[rejected],
            reference_total[chosen],
            reference_total[rejected],
            chosen_length=policy.length[chosen],
            rejected_length=policy.length[rejected],
            weight=given(batch.weight),
            target_margin=given(batch.target_margin),
            p_chosen=given(batch.p_chosen),
        )

    @torch.no_grad()
    def evaluate(self, micro: Micro) -> Metrics:
        """The metrics of held-out pairs, the loss among them."""
        total, metrics = self(micro)
        weight = micro.batch.weights().double().sum().to(total.device)
        return {"loss": (total, weight), **metrics}

    @torch.no_grad()
    def culprits(self, micro: Micro) -> list[int]:
        """The row ids whose own loss is not finite."""
        losses = self.loss(self.scores(micro), beta=self.beta)
        bad = (~losses.isfinite()).tolist()
        return [row for row, is_bad in zip(self.rows_of(micro), bad, strict=True) if is_bad]

    def after_step(self, step: int) -> None:
        self.reference.update(step)

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.reference.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reference.load_state_dict(state["reference"])


def _weight(scores: PairScores) -> Tensor:
    return torch.ones_like(scores.policy_chosen) if scores.weight is None else scores.weight


@torch.no_grad()
def _metrics(scores: PairScores, beta: float, weight: Tensor) -> Metrics:
    """The field's preference metrics as (weighted sum, sum of weights); ties count one half."""
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
    count = weight.sum()
    return {name: ((value.double() * weight).sum(), count) for name, value in values.items()}
