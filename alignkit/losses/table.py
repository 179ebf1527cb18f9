"""The loss table: what a loss is called, where it comes from, and what it needs.

A new loss is one function and one row.

Losses that couple the batch (`Loss.coupled`) are functions of the *global* batch of scores: the
caller gathers it over micro-batches and processes, leaving out rows of weight 0. What they carry
from step to step is a plain mapping of tensors that the caller keeps, saves and hands in:

    state = {}                                                     # of a new run
    state = row.next_state(scores, state, beta=beta, **keywords)   # once per step, training only
    losses = row(scores, beta=beta, state=state, **keywords)       # (B,), with gradient

`next_state` of a row without state returns {}, so the same lines serve every row. Held-out pairs
are evaluated with the state as it stands.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignkit.errors import ConfigError, nearest
from alignkit.losses.ranges import within
from alignkit.losses.scores import GroupScores, PairScores, UnpairedScores

State = Mapping[str, Tensor]
"""What a loss carries from step to step: small detached tensors by name."""


class Golden(NamedTuple):
    """The value on the table's example (docs/formulas.md), with the loss's default keywords."""

    beta: float
    value: float


class Beta(NamedTuple):
    """A default beta and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True)
class Loss:
    """A row of a loss table; called like its function.

    Attributes:
        name: the name users write.
        function: `(scores, *, beta, **keywords) -> (B,)`, per example, unreduced; takes `state` too
            where `update` is given.
        paper: where it comes from.
        equation: the formula in our symbols (docs/formulas.md).
        betas: wing -> default beta and where it comes from.
        laws: names of the laws (tests/laws) that the loss obeys.
        at_reference: the value for policy = reference as a function of beta; None for losses that
            have no reference.
        golden: its value on the table's example.
        minimiser: where the expected loss of one example is smallest, in words.
        needs_reference: whether the reference's log-likelihoods enter.
        coupled: whether one example's loss depends on the others of the global batch.
        scale_free: a function of beta * log_ratio alone up to a constant factor, so that it means
            something in any unit of the log-ratio.
        modalities: the wings whose numbers the loss is made for.
        needs: optional fields of the scores that it cannot do without.
        refuses: optional field of the scores -> why it has no meaning for this loss.
        no_divergence: why `divergence=` other than reverse KL is refused; empty if it is allowed.
        update: `(scores, state, *, beta, **keywords) -> state`, for losses that carry a state.
    """

    name: str
    function: Callable[..., Tensor]
    paper: str
    equation: str
    betas: Mapping[str, Beta]
    laws: frozenset[str]
    at_reference: Callable[[float], float] | None
    golden: Golden | None = None
    minimiser: str = ""
    needs_reference: bool = True
    coupled: bool = False
    scale_free: bool = True
    modalities: tuple[str, ...] = ("text", "image")
    needs: tuple[str, ...] = ()
    refuses: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    no_divergence: str = ""
    update: Callable[..., dict[str, Tensor]] | None = None

    @property
    def defaults(self) -> Mapping[str, Mapping[str, float]]:
        """Wing -> default keywords."""
        return {wing: {"beta": beta.value} for wing, beta in self.betas.items()}

    @property
    def keywords(self) -> Mapping[str, Any]:
        """The loss's own options and their defaults (beta left out)."""
        parameters = inspect.signature(self.function).parameters.values()
        return {
            p.name: p.default
            for p in parameters
            if p.kind is p.KEYWORD_ONLY and p.name not in ("beta", "state")
        }

    def size(self, beta: float) -> float:
        """How large the loss is at beta, beside beta 1; 1 for most.

        A `scale_free` loss is this times a function of beta * log_ratio. Squared losses with their
        target at 1 / (2 beta), such as IPO, have 1 / beta^2.
        """
        if not self.scale_free or self.at_reference is None or not self.at_reference(1.0):
            return 1.0
        return self.at_reference(beta) / self.at_reference(1.0)

    def check_keywords(self, given: Mapping[str, Any]) -> None:
        """Raise `ConfigError` for an option that this loss does not have."""
        for name in given:
            if name not in self.keywords:
                listed = ", ".join(self.keywords) or "none"
                raise ConfigError(
                    f"Loss {self.name!r} has no option {name!r}.{nearest(name, self.keywords)} "
                    f"Its options: {listed}."
                )

    def check_fields(self, scores: Any) -> None:
        """Raise `ConfigError` for a column of the data that has no meaning for this loss."""
        for name, reason in self.refuses.items():
            if getattr(scores, name) is not None:
                raise ConfigError(
                    f"Loss {self.name!r} does not take {name}: {reason}. Leave the column out, or "
                    "take a loss such as 'sigmoid'."
                )

    def next_state(
        self, scores: Any, state: State, *, beta: float, **keywords: Any
    ) -> dict[str, Tensor]:
        """The state after seeing a global batch; {} for a loss that carries none."""
        if self.update is None:
            return {}
        with torch.no_grad():
            return self.update(scores, state, beta=beta, **self._own(keywords))

    def __call__(
        self, scores: Any, *, beta: float, state: State | None = None, **keywords: Any
    ) -> Tensor:
        """(B,) losses. A loss with a state starts from this batch if none is given."""
        self.check_keywords(keywords)
        self.check_fields(scores)
        arguments = {"beta": beta, **self._own(keywords)}
        if self.update is not None:
            arguments["state"] = state or self.next_state(scores, {}, beta=beta, **keywords)
        return self._values(scores, arguments, keywords)

    def _own(self, keywords: Mapping[str, Any]) -> Mapping[str, Any]:
        """The keywords that `function` itself takes."""
        return keywords

    def _values(
        self, scores: Any, arguments: dict[str, Any], keywords: Mapping[str, Any]
    ) -> Tensor:
        return self.function(scores, **arguments)

    def probe(self) -> Any:
        """One neutral example with every field, for trying out options."""
        raise NotImplementedError


@dataclass(frozen=True)
class PairLoss(Loss):
    """A pairwise loss of `PairScores`.

    Attributes:
        mixes: `p_chosen` q turns f into q f(scores) + (1 - q) f(swapped scores), here. False for a
            loss that reads `p_chosen` itself.
    """

    mixes: bool = True

    def _values(
        self, scores: PairScores, arguments: dict[str, Any], keywords: Mapping[str, Any]
    ) -> Tensor:
        loss = self.function(scores, **arguments)
        if scores.p_chosen is None or not self.mixes:
            return loss
        q = scores.p_chosen
        return q * loss + (1 - q) * self.function(scores.swapped(), **arguments)

    def probe(self) -> PairScores:
        zero, one = torch.zeros(1), torch.ones(1)
        return PairScores(
            zero,
            zero,
            zero,
            zero,
            chosen_length=one,
            rejected_length=one,
            score_chosen=one,
            score_rejected=zero,
            uniform=zero,
        )


@dataclass(frozen=True)
class UnpairedLoss(Loss):
    """A loss of `UnpairedScores`; every one of them weighs its two classes."""

    @property
    def keywords(self) -> Mapping[str, Any]:
        return {"desirable_weight": 1.0, "undesirable_weight": 1.0, **super().keywords}

    def _own(self, keywords: Mapping[str, Any]) -> Mapping[str, Any]:
        return {name: value for name, value in keywords.items() if name not in _CLASS_WEIGHTS}

    def _values(
        self, scores: UnpairedScores, arguments: dict[str, Any], keywords: Mapping[str, Any]
    ) -> Tensor:
        liked, disliked = (keywords.get(name, 1.0) for name in _CLASS_WEIGHTS)
        within("[0, inf)", self.name, desirable_weight=liked, undesirable_weight=disliked)
        loss = self.function(scores, **arguments)
        return loss * (disliked + (liked - disliked) * scores.desirable.to(loss.dtype))

    def probe(self) -> UnpairedScores:
        zero = torch.zeros(2)
        liked = torch.tensor([True, False])
        return UnpairedScores(zero, zero, liked, length=torch.ones(2), kl=zero)


_CLASS_WEIGHTS = ("desirable_weight", "undesirable_weight")


@dataclass(frozen=True)
class GroupLoss(Loss):
    """A loss of `GroupScores`, one value per group."""

    def probe(self) -> GroupScores:
        zero = torch.zeros(1, 2)
        return GroupScores(zero, zero, torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool))
