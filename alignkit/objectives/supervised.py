"""Supervised fine-tuning: the likelihood of demonstrations, per scored token.

    loss = sum over rows i, tokens t of w_i f(x_it) / sum over rows i of w_i n_i

x_it is the log-likelihood of a scored token, n_i their number. The sum is returned, and the trainer
divides it once by the denominator of the *global* batch: a mean per micro-batch would weigh a short
one like a long one. An image is one token, and its loss the denoising error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.batches import Batch, Likelihood, Metrics
from alignkit.losses import SupervisedLoss
from alignkit.objectives.modifiers import ROUTER
from alignkit.objectives.pieces import Micro, present
from alignkit.objectives.strata import losses_by_stratum
from alignkit.protocols import Backend, Trainable

_NOTHING: frozenset[str] = frozenset()
_TOKENS = frozenset({"token_logps", "token_mask"})
_ACCURACY = frozenset({"correct"})


class SupervisedObjective:
    """A loss of the tokens of demonstrations.

    Args:
        backend: evaluates the policy.
        loss: a row of `SUPERVISED_LOSSES`.
        rows: kind of rows.
        loss_on: which tokens are scored, for a wing whose answers have several; the rows are read
            so.
        tokens: whether likelihoods are made of tokens, which have an accuracy and a perplexity.
        router: weight of the load-balancing loss of the policy's experts, which belongs to a whole
            micro-batch and is averaged over them by their tokens.
        scale: of the loss: 2 where a likelihood is minus half the error that is the loss.
        seed: of the draws.
        budget: rows per micro-batch, or "auto".
    """

    mismatched = False

    def __init__(
        self,
        backend: Backend,
        loss: SupervisedLoss,
        *,
        rows: str = "supervised",
        loss_on: str | None = None,
        tokens: bool = True,
        scale: float = 1.0,
        router: float = 0.0,
        seed: int = 0,
        budget: int | str = "auto",
    ) -> None:
        self.backend = backend
        self.loss = loss
        self.tokens = tokens
        self.scale = scale
        self.router = router
        self.seed = seed
        self.budget = budget
        self.requires = _NOTHING if loss.additive else _TOKENS
        if router:
            self.requires |= {ROUTER}
        self.reads = {"kind": rows} | ({} if loss_on is None else {"loss_on": loss_on})

    @property
    def trainable(self) -> Trainable:
        def wrapped(name: str, module: torch.nn.Module) -> None:
            self.backend.module = module

        return Trainable({"policy": self.backend.module}, wrapped)

    def prepare(self, runtime: Any) -> None:
        """There is nothing besides the policy."""

    def normaliser(self, batch: Batch) -> Tensor:
        """Scored tokens, each as often as its row's weight says."""
        lengths = torch.tensor(batch.content.scored_lengths(), dtype=torch.float64)
        return (batch.weights().double() * lengths).sum()

    def micro_batches(self, batch: Batch, step: int) -> Sequence[Micro]:
        pieces = self.backend.split(present(batch), self.budget)
        return [Micro(piece, (self.seed, step)) for piece in pieces]

    def absent(self, micro: Micro) -> Micro:
        return micro.absent()

    def _likelihood(self, micro: Micro, want: frozenset[str]) -> Likelihood:
        draw = self.backend.draw(micro.batch, micro.key)
        found: Likelihood = self.backend.module(micro.batch, draw, want)
        return found

    def _losses(self, found: Likelihood) -> Tensor:
        """(G,) float64, of each row the sum over its tokens."""
        if self.loss.additive:
            return self.scale * self.loss(found.total).double()
        losses = self.loss(found.extras["token_logps"])
        scored = losses.masked_fill(~found.extras["token_mask"], 0.0)
        return self.scale * scored.double().sum(-1)

    def __call__(self, micro: Micro) -> tuple[Tensor, Metrics]:
        found = self._likelihood(micro, self.requires)
        weight = _weight(micro.batch, found)
        total = (self._losses(found) * weight).sum()
        # Where the loss is another one than the likelihood's, that is worth a look beside it.
        metrics = found.spent()
        if not self.loss.additive:
            metrics["nll"] = self._nll(found, weight)
        if self.router:
            aux = found.extras[ROUTER][0].double()
            total = total + self.router * aux * (found.length.double() * weight).sum()
            metrics["router/aux_loss"] = (aux.detach(), torch.ones_like(aux))
        return total, metrics

    @torch.no_grad()
    def _nll(self, found: Likelihood, weight: Tensor) -> tuple[Tensor, Tensor]:
        nll = -self.scale * (found.total.double() * weight).sum()
        return nll, (found.length.double() * weight).sum()

    @torch.no_grad()
    def evaluate(self, micro: Micro) -> Metrics:
        """The negative log-likelihood per token of held-out rows, whatever loss is trained; of
        likelihoods that are errors at drawn places also by stratum.
        """
        found = self._likelihood(micro, _ACCURACY if self.tokens else _NOTHING)
        weight = _weight(micro.batch, found)
        nll, count = self._nll(found, weight)
        if not self.tokens:
            errors = -self.scale * found.total.double()
            strata = losses_by_stratum(self.backend, micro, errors, weight)
            return {"loss": (nll, count), **strata}
        correct = (found.extras["correct"].double() * weight).sum()
        return {"loss": (nll, count), "token_accuracy": (correct, count)}

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """The perplexity: e to the loss per token."""
        return {"perplexity": _exp(means["loss"])} if self.tokens and "loss" in means else {}

    @torch.no_grad()
    def culprits(self, micro: Micro) -> list[int]:
        """The row ids whose own loss is not finite."""
        finite = self._losses(self._likelihood(micro, self.requires)).isfinite().tolist()
        return [row for row, fine in zip(self.rows_of(micro), finite, strict=True) if not fine]

    def rows_of(self, micro: Micro) -> list[int]:
        return micro.batch.row_id.tolist()

    def after_step(self, step: int) -> None:
        """There is no state."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state."""


def _weight(batch: Batch, found: Likelihood) -> Tensor:
    """(G,) float64 on the device; rows have one answer each."""
    assert batch.num_answers == batch.num_groups, (batch.num_answers, batch.num_groups)
    return batch.weights().to(found.total.device, torch.float64, non_blocking=True)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
