"""The loss table: what a loss is called, where it comes from, and what it needs.

A new loss is one function and one row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from alignkit.errors import ConfigError, nearest


@dataclass(frozen=True)
class Loss:
    """A row of a loss table; called like its function.

    Attributes:
        name: the name users write.
        function: `(scores, *, beta, **keywords) -> (B,)`, per example, unreduced.
        paper: where it comes from.
        equation: the formula in our symbols: b = beta, w and l = log-ratio of chosen and rejected,
            h = w - l, m = target margin, L(x) = -log sigmoid(x).
        defaults: wing -> default keywords, beta among them.
        sources: wing -> where that default beta comes from.
        laws: names of the laws (tests/laws) that the loss obeys.
        at_reference: the value for policy = reference as a function of beta, in words and as code.
        needs_reference: whether the reference's log-likelihoods enter.
        coupled: whether one example's loss depends on the others of the global batch.
        scale_free: a function of beta * log_ratio alone up to a constant factor, so that it means
            something in any unit of the log-ratio.
    """

    name: str
    function: Callable[..., Tensor]
    paper: str
    equation: str
    defaults: Mapping[str, Mapping[str, float]]
    sources: Mapping[str, str]
    laws: frozenset[str]
    at_reference: Callable[[float], float]
    needs_reference: bool = True
    coupled: bool = False
    scale_free: bool = True

    @property
    def keywords(self) -> Mapping[str, Any]:
        """The loss's own options and their defaults (beta left out)."""
        parameters = inspect.signature(self.function).parameters.values()
        return {
            p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "beta"
        }

    def check_keywords(self, given: Mapping[str, Any]) -> None:
        """Raise `ConfigError` for an option that this loss does not have."""
        for name in given:
            if name not in self.keywords:
                listed = ", ".join(self.keywords) or "none"
                raise ConfigError(
                    f"Loss {self.name!r} has no option {name!r}.{nearest(name, self.keywords)} "
                    f"Its options: {listed}."
                )

    def __call__(self, scores: Any, *, beta: float, **keywords: Any) -> Tensor:
        self.check_keywords(keywords)
        return self.function(scores, beta=beta, **keywords)


@dataclass(frozen=True)
class PairLoss(Loss):
    """A pairwise loss. `p_chosen` q turns any f into q f(scores) + (1 - q) f(swapped scores)."""

    def __call__(self, scores: Any, *, beta: float, **keywords: Any) -> Tensor:
        self.check_keywords(keywords)
        loss = self.function(scores, beta=beta, **keywords)
        if scores.p_chosen is None:
            return loss
        q = scores.p_chosen
        return q * loss + (1 - q) * self.function(scores.swapped(), beta=beta, **keywords)
