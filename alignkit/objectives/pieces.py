"""Pieces of a global batch on their way through an objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alignkit.batches import Batch, Likelihood, Metrics
from alignkit.objectives.kinds import Scores
from alignkit.protocols import Key


@dataclass(frozen=True)
class Scored:
    """A piece's numbers, on the device.

    Attributes:
        scores: what losses take, with graph where gradients are on.
        weight: (G,) float64, of the data.
        factor: (G,) what each example's losses count besides, or None.
        anchor: (G,) a term of its own, with graph, or None.
        reference: kept for a second pass.
        metrics: of the modifiers.
    """

    scores: Scores
    weight: Tensor
    factor: Tensor | None
    anchor: Tensor | None
    reference: Likelihood
    metrics: Metrics

    def counted(self, losses: Tensor) -> Tensor:
        """The summed losses of the piece, in float64: the mean of a large batch keeps the last bits
        of its members.
        """
        weight = self.weight if self.factor is None else self.weight * self.factor
        return (losses.double() * weight).sum()

    def finite(self) -> Tensor:
        """(G,) bool: whether the policy's numbers are."""
        named = vars(self.scores).items()
        found = [value.isfinite() for name, value in named if name.startswith("policy")]
        return torch.stack(found).all(0)

    def anchored(self) -> Tensor | float:
        """The summed anchor term."""
        return 0.0 if self.anchor is None else (self.anchor.double() * self.weight).sum()


@dataclass(frozen=True)
class Known:
    """What a pass over the global batch, without gradient, found for one piece.

    Attributes:
        scored: the piece's numbers.
        losses: (G,) its losses, as parts of the global batch.
        slopes: field of the scores -> d (summed loss of the global batch) / d field.
        sound: () bool, whether all scores of the global batch are finite.
    """

    scored: Scored
    losses: Tensor
    slopes: Mapping[str, Tensor]
    sound: Tensor

    def surrogate(self, scores: Scores) -> Tensor:
        """The piece's summed loss as a number, with the gradient that it has in the global batch:
        linear in the scores of a second pass.
        """
        linear = torch.stack(
            [(slope * getattr(scores, name)).double().sum() for name, slope in self.slopes.items()]
        ).sum()
        return self.scored.counted(self.losses) + (linear - linear.detach())


@dataclass(frozen=True)
class Micro:
    """A piece of a global batch.

    Attributes:
        batch: the piece.
        key: of its draws: (seed, step).
        kl: (G,) mean log-ratio of mismatched answers, where the loss needs it.
        known: of an earlier pass over the global batch, where the losses couple it.
    """

    batch: Batch
    key: Key
    kl: Tensor | None = None
    known: Known | None = None

    @property
    def sound(self) -> bool:
        """Whether what comes from the batch's other rows is finite. Reads the device."""
        if self.known is not None:
            return bool(self.known.sound)
        return self.kl is None or bool(self.kl.isfinite().all())

    def absent(self) -> Micro:
        """A piece of one row that occupies a process and adds nothing, also to a second pass."""
        batch = self.batch.select([0]).absent()
        known = None if self.known is None else _absent(self.known, batch.num_answers)
        kl = None if self.kl is None else self.kl[:1]
        return Micro(batch, self.key, kl, known)


def _absent(known: Known, answers: int) -> Known:
    scored = known.scored
    scores: Any = scored.scores
    first = {n: v[:1] for n, v in vars(scores).items() if isinstance(v, Tensor)}
    reference = scored.reference
    nothing: dict[str, Any] = {
        "scores": replace(scores, **first),
        "weight": torch.zeros_like(scored.weight[:1]),
        "reference": Likelihood(
            reference.total[:answers],
            reference.length[:answers],
            {name: value[:answers] for name, value in reference.extras.items()},
        ),
        "metrics": {},
    }
    for name in ("factor", "anchor"):
        value = getattr(scored, name)
        nothing[name] = None if value is None else value[:1]
    slopes = {name: torch.zeros_like(value[:1]) for name, value in known.slopes.items()}
    return Known(Scored(**nothing), known.losses[:1], slopes, known.sound)


def present(batch: Batch) -> Batch:
    """Without rows of weight 0, but for one that keeps an empty process in step."""
    rows = batch.weights().nonzero().flatten().tolist()
    if not rows:
        return batch.select([0])
    return batch if len(rows) == batch.num_groups else batch.select(rows)
