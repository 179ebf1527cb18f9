"""Policy gradients: answers that the policy wrote, with what a rollout found out about them, in; a
summed loss and its metrics out.

    loss = sum over answers i, tokens t of  w_it [ L_policy + vf_coef L_value - entropy_coef H ]
         + kl_coef sum_i w_i KL_i            (kl_mode loss_k2 and loss_k3)
    divided once, by the global batch's number of tokens (or of answers)
         + ptx_coef * negative log-likelihood per token of other rows (PPO-ptx)

A minibatch is evaluated by the machinery of every other method: packed, each prompt once for all of
its answers. `look` is the pass over a rollout before it is learned from; it evaluates the very
pieces of the first epoch, so that there the ratio of new to old is 1 to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.batches import Batch, Likelihood, Metrics
from alignkit.losses.kl import kl_loss
from alignkit.losses.policy_gradient import clipped_surrogate, clipped_value_loss, reinforce
from alignkit.methods import PolicyGradient
from alignkit.objectives.critics import Critic
from alignkit.objectives.experience import Facts, Piece, mask_of, told
from alignkit.objectives.looking import look
from alignkit.objectives.pieces import present
from alignkit.protocols import Backend, Collective, Reference, Trainable

_ALONE: Any = SimpleNamespace(rank=0, size=1, sum=lambda value: value, gather=lambda value: value)


class PolicyGradientObjective:
    """See the module.

    Args:
        backend: evaluates the policy.
        method: its options.
        reference: what the KL is to; None where there is none.
        critic: what values states; None where there is none.
        beside: rows that are trained on beside the answers: a source with `at(step)`.
        seed: of the draws.
        budget: groups per micro-batch, or "auto".
    """

    def __init__(
        self,
        backend: Backend,
        method: PolicyGradient,
        *,
        reference: Reference | None = None,
        critic: Critic | None = None,
        beside: Callable[[int], Batch] | None = None,
        seed: int = 0,
        budget: int | str = "auto",
    ) -> None:
        self.backend = backend
        self.method = method
        self.reference = reference
        self.critic = critic
        self.beside = beside
        self.seed = seed
        self.budget = budget
        self.collective: Collective = _ALONE
        self.phase_over = False
        self._moved: list[Tensor] = []
        extras = {"token_logps"} | ({"entropy"} if method.entropy_coef else set())
        self.requires = frozenset(extras | (critic.of_policy if critic else set()))

    @property
    def trainable(self) -> Trainable:
        modules = {"policy": self.backend.module}
        if self.critic is not None:
            modules |= self.critic.modules()

        def wrapped(name: str, module: nn.Module) -> None:
            if name == "policy":
                self.backend.module = module
            else:
                assert self.critic is not None
                self.critic.replace(module)

        return Trainable(modules, wrapped)

    def prepare(self, runtime: Any) -> None:
        self.collective = runtime
        if self.reference is not None:
            self.reference.prepare(runtime)

    def normaliser(self, batch: Batch) -> Tensor:
        mask, weight = mask_of(batch), batch.weights()[batch.group].double()
        if self.method.per == "token":
            return (mask * weight[:, None]).sum()
        return (mask.any(-1) * weight).sum()

    # --- pieces ------------------------------------------------------------------------------

    def micro_batches(self, batch: Batch, step: int) -> Sequence[Piece]:
        """Rows beside first: the last backward, in which gradients are exchanged, is to be one that
        every trained module takes part in.
        """
        self._moved = []
        key = (self.seed, step)
        if step == 0:  # an evaluation reads what the rollout measured
            return [Piece(batch, key)]
        pieces = [Piece(p, key) for p in self.backend.split(present(batch), self.budget)]
        return [*self._beside(batch, step), *self.evened(pieces)]

    def _beside(self, batch: Batch, step: int) -> list[Piece]:
        if self.beside is None:
            return []
        rows = self.beside(step)
        lengths = torch.tensor(rows.content.scored_lengths(), dtype=torch.float64)
        shares = torch.stack([self.normaliser(batch), (rows.weights().double() * lengths).sum()])
        ours, theirs = self.collective.sum(shares).tolist()
        split = self.backend.split(present(rows), self.budget)
        return self.evened([Piece(one, (self.seed, step), ours / theirs) for one in split])

    def evened(self, pieces: Sequence[Piece]) -> list[Piece]:
        """As many on every process: sharded forwards talk to each other."""
        num = int(self.collective.gather(torch.tensor([len(pieces)])).max())
        return [*pieces, *[pieces[0].absent()] * (num - len(pieces))]

    def absent(self, micro: Piece) -> Piece:
        return micro.absent()

    # --- losses ------------------------------------------------------------------------------

    def __call__(self, micro: Piece) -> tuple[Tensor, Metrics]:
        if micro.scale is not None:
            return self._pretraining(micro, micro.scale)
        warm = self.critic is not None and micro.key[1] <= self.critic.warmup
        if self.critic is not None:
            self.critic.warm(warm)
        found = self.policy(micro, self.requires)
        facts = Facts.of(micro.batch, found.extras["token_logps"], self.method.per)
        losses, metrics = self._surrogate(facts)
        total = (losses.double() * facts.counts).sum()
        total = total + self._kl(facts)
        if self.method.entropy_coef:
            entropy = found.extras["entropy"]
            total = total - self.method.entropy_coef * (entropy.double() * facts.counts).sum()
        total = total * 0.0 if warm else total
        spent = facts.measured(metrics) | found.spent()
        if self.critic is not None:
            loss, measured = self._value_loss(micro, found, facts)
            total = total + loss
            spent |= facts.measured(measured)
        return total, spent | told(micro.batch, facts)

    def policy(self, micro: Piece, want: frozenset[str]) -> Likelihood:
        found: Likelihood = self.backend.module(
            micro.batch, self.backend.draw(micro.batch, micro.key), want
        )
        return found

    def _surrogate(self, facts: Facts) -> tuple[Tensor, dict[str, Tensor]]:
        """(N, T) losses and metrics of the policy."""
        if self.method.surrogate == "reinforce":
            losses = reinforce(facts.logps, facts("advantages"), facts.mask)
            return losses, {"loss/policy": losses.detach()}
        losses, measured = clipped_surrogate(
            facts.logps,
            facts("old_logps"),
            facts("advantages"),
            facts.mask,
            clip_range=self.method.clip_range,  # type: ignore[union-attr]
        )
        counted = facts.counts > 0
        self._moved.append(torch.stack([(measured["k3"] * counted).sum(), counted.sum()]))
        return losses, {
            "loss/policy": losses.detach(),
            "policy/clipfrac": measured["clipped"],
            "policy/ratio": measured["ratio"],
            "policy/approxkl": measured["k3"],
        }

    def _kl(self, facts: Facts) -> Tensor | float:
        """The KL as a loss. Its weight per answer is that of a token, so that it stands to the
        policy's loss as it would in the reward.
        """
        place, _, kind = self.method.kl_mode.partition("_")
        if place != "loss" or self.reference is None:
            return 0.0
        old, of_reference = facts("old_logps"), facts("reference_logps")
        losses = kl_loss(kind, facts.logps, old, of_reference, facts.mask)
        coefficient = facts.phase["objective/kl_coef"]
        return coefficient * (losses.double() * facts.counts.amax(-1)).sum()

    def _value_loss(
        self, micro: Piece, found: Likelihood, facts: Facts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.critic is not None
        values = self.critic.values(micro.batch, found)
        losses, measured = clipped_value_loss(
            values,
            facts("values"),
            facts("returns"),
            facts.mask,
            clip_range=getattr(self.method, "value_clip_range", None),
        )
        loss = (losses.double() * facts.counts).sum()
        metrics = {"loss/value": losses.detach(), "critic/clipfrac": measured["clipped"]}
        return self.critic.weight * loss, metrics

    def _pretraining(self, micro: Piece, scale: float) -> tuple[Tensor, Metrics]:
        """PPO-ptx: the mean over tokens of the rows beside, whatever the answers are meant over."""
        found = self.policy(micro, frozenset())
        weight = micro.batch.weights().to(found.total.device, torch.float64)
        nll = -(found.total.double() * weight).sum()
        warm = self.critic is not None and micro.key[1] <= self.critic.warmup
        tokens = (found.length.double() * weight).sum()
        factor = 0.0 if warm else self.method.ptx_coef * scale
        return factor * nll, {"ptx/nll": (nll.detach(), tokens)}

    def look(self, batch: Batch, *, ends: bool = False) -> dict[str, Tensor]:
        """See `looking.look`."""
        return look(self, batch, ends)

    @property
    def looks(self) -> list[str]:
        """Names of what `look` may return."""
        names = ["old_logps", "entropy"]
        names += ["reference_logps"] if self.reference is not None else []
        return names + (["values", "final_values"] if self.critic is not None else [])

    # --- the rest of an objective ------------------------------------------------------------

    def rows_of(self, micro: Piece) -> list[int]:
        return micro.batch.row_id.tolist()

    @torch.no_grad()
    def culprits(self, micro: Piece) -> list[int]:
        found = self.policy(micro, self.requires).total
        if self.critic is not None and micro.scale is None:
            values = self.critic.values(micro.batch, self.policy(micro, self.requires))
            found = found + values.sum(-1)
        lost = (~found.isfinite()).nonzero().flatten().tolist()
        groups = micro.batch.group.tolist()
        rows = self.rows_of(micro)
        return sorted({rows[groups[answer]] for answer in lost})

    def evaluate(self, micro: Piece) -> Metrics:
        """The scores of held-out prompts' answers, and their KL, as their rollout measured them."""
        return told(micro.batch, None)

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        return {}

    def after_step(self, step: int) -> None:
        """Decide whether this rollout has been learned from for long enough."""
        if self.reference is not None:
            self.reference.update(step)
        limit = getattr(self.method, "early_stop_kl", None)
        if limit is None or not self._moved:
            return
        total, count = self.collective.sum(torch.stack(self._moved).double().sum(0)).tolist()
        self.phase_over = total > limit * count

    def state_dict(self) -> dict[str, Any]:
        return {} if self.reference is None else {"reference": self.reference.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])
