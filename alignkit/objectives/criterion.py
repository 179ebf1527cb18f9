"""What is made of scores: a loss with its beta, its keywords and its state, under a divergence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from alignkit.losses import GroupLoss, Loss, PairScores, State, UnpairedLoss, WeightedSum
from alignkit.losses.divergences import capped, with_divergence
from alignkit.objectives.kinds import GROUPS, PAIRS, UNPAIRED, Kind, Scores

NO_STATE: State = MappingProxyType({})


@dataclass(frozen=True)
class OwnLoss:
    """A user's function in the place of a table row: `(scores, *, beta, **keywords) -> (B,)`.

    The columns of pairs mean for it what they mean for the table's margin losses. `p_chosen` q
    makes it q f(scores) + (1 - q) f(swapped scores). `target_margin` m is taken from the margin
    before it is called, as m / beta, so that b h - m is the logit it sees.
    """

    function: Callable[..., Tensor]
    kind: Kind = PAIRS
    coupled: bool = False
    needs_reference: None = None  # only its author knows
    update: None = None
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def next_state(self, scores: Any, state: State, **_: Any) -> dict[str, Tensor]:
        return {}

    def __call__(
        self, scores: Any, *, beta: float, state: State | None = None, **keywords: Any
    ) -> Tensor:
        if not isinstance(scores, PairScores):
            return self.function(scores, beta=beta, **keywords)
        loss = self.function(_less_target(scores, beta), beta=beta, **keywords)
        if scores.p_chosen is None:
            return loss
        swapped = _less_target(scores.swapped(), beta)
        q = scores.p_chosen
        return q * loss + (1 - q) * self.function(swapped, beta=beta, **keywords)


def _less_target(scores: PairScores, beta: float) -> PairScores:
    if scores.target_margin is None:
        return scores
    less = scores.policy_chosen - scores.target_margin / beta
    return replace(scores, policy_chosen=less, target_margin=None)


@dataclass(frozen=True)
class Criterion:
    """A loss ready to be called.

    Attributes:
        loss: a row of a loss table, a sum of rows, or a user's function.
        beta: in the unit of the wing's log-ratio.
        keywords: the loss's own options.
        divergence, divergence_alpha: what holds the policy to the reference; see
            `alignkit.losses.divergences`.
        scale: what the losses are multiplied by.
        read_as: how likelihoods become scores, where that is not the loss's own way.
    """

    loss: Loss | OwnLoss
    beta: float
    keywords: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    divergence: str = "reverse_kl"
    divergence_alpha: float = 0.5
    scale: float = 1.0
    read_as: Kind | None = None

    @classmethod
    def of(cls, loss: Any, *, beta: float, **keywords: Any) -> Criterion:
        """Of a table row, or of a function of the user's own."""
        row = loss if isinstance(loss, (Loss, OwnLoss)) else OwnLoss(loss)
        return cls(row, beta, keywords)

    @property
    def kind(self) -> Kind:
        """The kind of row whose scores the loss takes."""
        return kind_of(self.loss) if self.read_as is None else self.read_as

    @property
    def couples(self) -> bool:
        """Whether an example's loss, or the loss's state, depends on the scores of the whole global
        batch. The mean of `kl` alone does not count: it is known before the losses are.
        """
        parts = self.loss.parts if isinstance(self.loss, WeightedSum) else ((1.0, self.loss),)
        return any(
            row.update is not None or (row.coupled and "kl" not in row.needs) for _, row in parts
        )

    def next_state(self, scores: Scores, state: State) -> State:
        """The loss's state after seeing a global batch."""
        seen = self._measured(scores)
        held = _beside(scores, state)
        return self.loss.next_state(seen, held, beta=self.beta, **self.keywords)

    def __call__(self, scores: Scores, state: State = NO_STATE) -> Tensor:
        """(B,) losses, unreduced."""
        seen, held = self._measured(scores), _beside(scores, state)
        losses = self.loss(seen, beta=self.beta, state=held, **self.keywords)
        num = len(next(v for v in vars(scores).values() if isinstance(v, Tensor)))
        if not isinstance(losses, Tensor) or losses.shape != (num,):
            found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"A preference loss returns one value per example, unreduced; {self.loss.name!r} "
                f"returned {found} for {num} examples."
            )
        return losses if self.scale == 1.0 else self.scale * losses

    def _measured(self, scores: Any) -> Any:
        return with_divergence(scores, self.divergence, self.divergence_alpha)

    def capped(self, scores: Scores) -> Tensor | None:
        """(B,) bool: whether the divergence is beyond its exponent's cap at an answer of the
        example; None for reverse KL.
        """
        if self.divergence == "reverse_kl":
            return None
        if isinstance(scores, PairScores):
            ratios = torch.stack([scores.chosen, scores.rejected], dim=1)
        else:
            ratios = scores.log_ratio
        found = capped(ratios, self.divergence, self.divergence_alpha)
        return found if found.ndim == 1 else found.any(1)


def kind_of(loss: Loss | OwnLoss) -> Kind:
    """The kind of row that a loss takes."""
    if isinstance(loss, OwnLoss):
        return loss.kind
    if isinstance(loss, WeightedSum):
        return kind_of(loss.parts[0][1])
    for table, kind in ((GroupLoss, GROUPS), (UnpairedLoss, UNPAIRED)):
        if isinstance(loss, table):
            return kind
    return PAIRS


def _beside(scores: Scores, state: State) -> State:
    """A state where the scores are; it comes from the CPU after a resume."""
    device = next(v.device for v in vars(scores).values() if isinstance(v, Tensor))
    return {name: value.to(device) for name, value in state.items()}
