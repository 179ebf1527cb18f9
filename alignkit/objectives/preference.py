"""Preference optimisation: likelihoods in, a summed loss and its metrics out.

One forward of policy and reference per micro-batch on a shared draw (alignkit.likelihood), a few
numbers per example into pure losses (alignkit.losses), the weighted *sum* out. The trainer divides
once by the sum of weights over the global batch, so that no split into micro-batches or processes
changes a result. Pairs, rankings and single labelled answers differ in their `Kind` alone.

A loss that couples the batch sees the global batch under any split (see `global_batch`), by two
passes; one micro-batch on one process is one pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from alignkit.batches import Batch, Likelihood, Metrics
from alignkit.draws import generator
from alignkit.likelihood import log_likelihoods
from alignkit.losses import Loss, State
from alignkit.objectives.criterion import Criterion, OwnLoss
from alignkit.objectives.global_batch import couple
from alignkit.objectives.kinds import Scores
from alignkit.objectives.modifiers import ROUTER, Modifiers, mean
from alignkit.objectives.pieces import Micro, Scored, present
from alignkit.objectives.strata import by_stratum, with_errors
from alignkit.protocols import Backend, Collective, Key, Reference, Trainable

_ALONE: Any = SimpleNamespace(rank=0, size=1, sum=lambda value: value, gather=lambda value: value)


class PreferenceObjective:
    """Losses of the log-ratios of policy to reference, over one kind of row.

    Args:
        backend: evaluates the policy.
        reference: evaluates the comparison.
        criterion: the losses; `Criterion.of(loss, beta=...)` for a single one.
        modifiers: what changes them.
        seed: of the draws.
        budget: groups per micro-batch, or "auto".
    """

    def __init__(
        self,
        backend: Backend,
        reference: Reference,
        criterion: Criterion,
        *,
        modifiers: Modifiers | None = None,
        seed: int = 0,
        budget: int | str = "auto",
    ) -> None:
        self.backend = backend
        self.reference = reference
        self.criterion = criterion
        self.modifiers = modifiers or Modifiers()
        self.seed = seed
        self.budget = budget
        self.requires = self.modifiers.of_policy | criterion.kind.wants
        self.collective: Collective = _ALONE
        self.state: State = {}
        self._next: State = {}

    @property
    def reads(self) -> dict[str, str]:
        return {"kind": self.criterion.kind.rows}

    @property
    def loss(self) -> Loss | OwnLoss:
        return self.criterion.loss

    @property
    def mismatched(self) -> bool:
        return "kl" in self.criterion.loss.needs

    @property
    def trainable(self) -> Trainable:
        def wrapped(name: str, module: torch.nn.Module) -> None:
            self.backend.module = module

        return Trainable({"policy": self.backend.module}, wrapped)

    def prepare(self, runtime: Any) -> None:
        self.collective = runtime
        self.reference.prepare(runtime)

    def normaliser(self, batch: Batch) -> Tensor:
        return batch.weights().double().sum()

    # --- pieces ------------------------------------------------------------------------------

    def micro_batches(self, batch: Batch, step: int) -> Sequence[Micro]:
        batch, key = present(batch), (self.seed, step)
        kl = self._kl_baseline(batch, key) if self.mismatched else None
        pieces = [
            Micro(piece, key, None if kl is None else kl[: piece.num_groups])
            for piece in self.backend.split(batch, self.budget)
        ]
        alone = self.collective.size == 1 and len(pieces) == 1
        if alone or not self.criterion.couples:
            return pieces
        with torch.no_grad():
            scored = [self._scored(piece) for piece in self._evened(pieces)][: len(pieces)]
        known = couple(pieces, scored, self.collective, lambda s: self._losses(s, step))
        return [replace(piece, known=one) for piece, one in zip(pieces, known, strict=True)]

    def absent(self, micro: Micro) -> Micro:
        return micro.absent()

    def _evened(self, pieces: Sequence[Micro]) -> list[Micro]:
        """As many on every process: sharded forwards talk to each other."""
        num = int(self.collective.gather(torch.tensor([len(pieces)])).max())
        return [*pieces, *[pieces[0].absent()] * (num - len(pieces))]

    @torch.no_grad()
    def _kl_baseline(self, batch: Batch, key: Key) -> Tensor:
        """(G,) log-ratios of prompts with other prompts' answers: their mean over the global batch,
        which is all that a loss takes of them.
        """
        if batch.mismatched is None:
            raise ValueError(
                "This loss estimates a KL from answers to other prompts, and the batch has none. "
                "Make its source with RowSource(..., mismatched=True)."
            )
        pieces = [Micro(p, key) for p in self.backend.split(batch.mismatched, self.budget)]
        found = [self._log_ratio(piece) for piece in self._evened(pieces)][: len(pieces)]
        ratios = torch.cat(found).double()
        weight = torch.cat([piece.batch.weights() for piece in pieces]).to(ratios)
        total, count = self.collective.sum(torch.stack([(ratios * weight).sum(), weight.sum()]))
        return (total / count).float().expand(batch.num_groups)

    def _log_ratio(self, micro: Micro) -> Tensor:
        policy, reference = log_likelihoods(self.backend, self.reference, micro.batch, micro.key)
        return policy.total - reference.total.to(policy.total.device)

    # --- numbers -----------------------------------------------------------------------------

    def scores(self, micro: Micro) -> Any:
        """The log-likelihoods of a piece as its losses take them: `PairScores` and so on."""
        return self._scored(micro).scores

    def _scored(self, micro: Micro) -> Scored:
        batch, modifiers, kind = micro.batch, self.modifiers, self.criterion.kind
        policy, reference = log_likelihoods(
            self.backend,
            self.reference,
            batch,
            micro.key,
            want=self.requires,
            want_of_reference=modifiers.of_both,
            known=micro.known.scored.reference if micro.known else None,
        )
        fields = self._fields(micro, policy)
        plain = kind.scores(batch, policy, reference, **fields)
        scores = plain
        if modifiers.ld_alpha is not None:
            both = modifiers.likelihood(policy), modifiers.likelihood(reference)
            scores = kind.scores(batch, *both, **fields)
        scores, metrics = modifiers.guarded(scores, batch, policy)
        factor = modifiers.factor(batch, policy)
        if factor is not None:
            metrics["wpo/weight"] = mean(factor, batch.weights())
        if modifiers.router:
            metrics["router/aux_loss"] = mean(policy.extras[ROUTER][:1].detach(), torch.ones(1))
        if micro.key[1]:  # a step, and no evaluation
            metrics |= policy.spent()
        return Scored(
            scores,
            batch.weights().to(policy.total.device, torch.float64, non_blocking=True),
            factor,
            modifiers.own_term(plain, batch, policy),
            reference,
            metrics,
        )

    def _fields(self, micro: Micro, policy: Likelihood) -> dict[str, Tensor]:
        """What losses ask for beside likelihoods and columns."""
        device = policy.total.device
        fields: dict[str, Tensor] = {}
        weight = micro.batch.weights()
        # An absent row has weight 0, of which no statistic could be made.
        if bool((weight != 1).any()) and bool((weight > 0).all()):
            fields["weight"] = weight.to(device, torch.float32, non_blocking=True)
        if micro.kl is not None:
            fields["kl"] = micro.kl
        if "uniform" in self.criterion.loss.needs:
            drawn = [
                generator("pair", *micro.key, position).random()
                for position in micro.batch.position.tolist()
            ]
            fields["uniform"] = torch.tensor(drawn, dtype=torch.float32, device=device)
        return fields

    def _losses(self, scores: Scores, step: int) -> Tensor:
        """(B,) losses. A training step moves the losses' state on, once it has been taken."""
        if step == 0:
            return self.criterion(scores, self.state)
        self._next = self.criterion.next_state(scores, self.state)
        return self.criterion(scores, self._next)

    # --- what the trainer asks for -------------------------------------------------------------

    def __call__(self, micro: Micro) -> tuple[Tensor, Metrics]:
        scored = self._scored(micro)
        if micro.known is None:
            total = scored.counted(self._losses(scored.scores, micro.key[1]))
        else:
            total = micro.known.surrogate(scored.scores)
        return total + scored.anchored(), self._metrics(scored)

    @torch.no_grad()
    def _metrics(self, scored: Scored) -> Metrics:
        criterion, scores, weight = self.criterion, scored.scores, scored.weight
        metrics = criterion.kind.metrics(scores, criterion.beta, weight) | scored.metrics
        metrics = with_errors(self.backend, metrics)
        capped = criterion.capped(scores)
        return metrics if capped is None else metrics | {"divergence/capped": mean(capped, weight)}

    def _known(self, micro: Micro) -> tuple[Scored, Tensor]:
        """A piece's numbers and losses, from an earlier pass where there was one."""
        if micro.known is not None:
            return micro.known.scored, micro.known.losses
        scored = self._scored(micro)
        return scored, self._losses(scored.scores, micro.key[1])

    @torch.no_grad()
    def evaluate(self, micro: Micro) -> Metrics:
        """The metrics of held-out rows, the loss among them."""
        scored, losses = self._known(micro)
        total = scored.counted(losses) + scored.anchored()
        kind, beta = self.criterion.kind, self.criterion.beta
        strata = by_stratum(self.backend, micro, kind, beta, scored)
        return {"loss": (total, scored.weight.sum()), **self._metrics(scored), **strata}

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        return self.criterion.kind.derived(means)

    @torch.no_grad()
    def culprits(self, micro: Micro) -> list[int]:
        """The row ids whose own loss is not finite."""
        scored, losses = self._known(micro)
        own = losses if scored.anchor is None else losses + scored.anchor
        bad = ~own.isfinite()
        if not micro.sound:
            # One row spoils the losses of all; it is the one whose own scores are not finite.
            bad = ~scored.finite()
        rows = zip(self.rows_of(micro), bad.tolist(), strict=True)
        return [row for row, is_bad in rows if is_bad]

    def rows_of(self, micro: Micro) -> list[int]:
        return micro.batch.row_id.tolist()

    def after_step(self, step: int) -> None:
        self.state = self._next
        self.reference.update(step)

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.reference.state_dict(), "loss": dict(self.state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reference.load_state_dict(state["reference"])
        self.state = self._next = state["loss"]
