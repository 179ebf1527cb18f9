"""Answers that the policy wrote, with what is known of them, on their way through an objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignkit.batches import Batch, Metrics
from alignkit.protocols import Key

WEIGHTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token": lambda mask, weight: mask * weight[:, None],
    "answer": lambda mask, weight: mask * weight[:, None],
    "answer_mean": lambda mask, weight: (
        mask * weight[:, None] / mask.sum(-1, keepdim=True).clamp(min=1)
    ),
}
"""What the losses are meant over -> ((N, T) mask, (N,) weight) -> what each token counts."""


@dataclass(frozen=True)
class Piece:
    """A piece of a minibatch, or of the rows that are trained on beside it.

    Attributes:
        batch: the piece.
        key: of its draws: (seed, step).
        scale: of rows beside, what turns their summed loss into a share of the minibatch's; None
            for answers.
    """

    batch: Batch
    key: Key
    scale: float | None = None

    def absent(self) -> Piece:
        return replace(self, batch=self.batch.select([0]).absent())


@dataclass(frozen=True)
class Facts:
    """What is known of a piece's answers, on the device.

    Attributes:
        logps: (N, T) with graph.
        mask: (N, T) tokens that count.
        counts: (N, T) float64, what each token counts in the losses.
        weight: (N,) float64.
        tokens, phase: of the experience.
    """

    logps: Tensor
    mask: Tensor
    counts: Tensor
    weight: Tensor
    tokens: Mapping[str, Tensor]
    phase: Mapping[str, float]

    @classmethod
    def of(cls, batch: Batch, logps: Tensor, per: str) -> Facts:
        assert batch.experience is not None, "answers without a rollout"
        device, width = logps.device, logps.shape[1]
        tokens = {
            name: value[:, :width].to(device, non_blocking=True)
            for name, value in batch.experience.tokens.items()
        }
        weight = batch.weights()[batch.group].to(device, torch.float64, non_blocking=True)
        mask = tokens["mask"]
        return cls(logps, mask, WEIGHTS[per](mask, weight), weight, tokens, batch.experience.phase)

    def __call__(self, name: str) -> Tensor:
        return self.tokens[name]

    def measured(self, values: Mapping[str, Tensor]) -> Metrics:
        """Means per token."""
        counts = self.mask * self.weight[:, None]
        return {
            name: ((value.double() * counts).sum().detach(), counts.sum())
            for name, value in values.items()
        }


def told(batch: Batch, facts: Facts | None) -> Metrics:
    """What the rollout measured, as means over answers; numbers of the phase as they are."""
    assert batch.experience is not None
    weight = batch.weights()[batch.group].double()
    found: Metrics = {}
    for name, value in batch.experience.answers.items():
        known = (~value.isnan()).double() * weight
        found[name] = ((value.nan_to_num().double() * known).sum(), known.sum())
    present = weight.sum()
    found |= {name: (value * present, present) for name, value in batch.experience.phase.items()}
    if facts is None:
        return found
    device = facts.weight.device
    return {name: (s.to(device), c.to(device)) for name, (s, c) in found.items()}


def mask_of(batch: Batch) -> Tensor:
    assert batch.experience is not None, "answers without a rollout"
    return batch.experience.tokens["mask"]


def wide(table: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(table, (0, width - table.shape[1]))


def places_of(pieces: Sequence[Batch], batch: Batch) -> Tensor:
    """Where each answer of a batch stands among those of its pieces."""
    positions = torch.cat([piece.position[piece.group] for piece in pieces])
    return torch.cat([(positions == p).nonzero().flatten() for p in batch.position.tolist()])
