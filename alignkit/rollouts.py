"""Online learning as a batch source: sample, score, look, credit, and hand out minibatches.

    rollout     `rollout_size` answers of the policy as it is, scored by the reward
    look        one pass of policy, reference and critic over them, without gradient
    credit      rewards with the KL taken off, advantages, returns
    minibatches of `batch_size` answers, in a new order in each of `inner_epochs` passes

A rollout is a phase. Between two of them the policy's weights, the prompts' position, the
controller of the KL and the scores' scale are all there is: a checkpoint is taken there, and a run
that goes on from it samples the same answers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alignkit.answering import Answers, Writer
from alignkit.batches import Batch, Experience
from alignkit.credit import Looked, credit
from alignkit.draws import generator
from alignkit.errors import DataError
from alignkit.kl_control import KLController
from alignkit.losses.importance import mismatch, truncated_importance
from alignkit.methods import PolicyGradient
from alignkit.objectives.policy_gradient import PolicyGradientObjective
from alignkit.protocols import Collective
from alignkit.rollout_measures import health, measure, table
from alignkit.running import RunningMoments
from alignkit.sources import RowSource
from alignkit.stream_source import StreamSource

log = logging.getLogger("alignkit")


@dataclass(frozen=True)
class Phase:
    """What a rollout leaves for the report.

    Attributes:
        number: 1 for the first.
        rows: prompt, answer, score, tokens, cut, kl of a few answers; those of this process.
    """

    number: int
    rows: Sequence[Mapping[str, Any]]


class RolloutSource:
    """See the module.

    Args:
        prompts: batches of prompts, all of them on every process.
        writer: answers and scores them.
        objective: looks at them.
        controller: the strength of the KL.
        batch_size: answers of one optimizer step, over all processes.
        rollout_size: answers of one phase.
        phases: how many there will be; None is endless.
        seed: of the minibatches' order.
        processes: rank and size.
    """

    def __init__(
        self,
        prompts: RowSource | StreamSource,
        writer: Writer,
        objective: PolicyGradientObjective,
        controller: KLController,
        *,
        batch_size: int,
        rollout_size: int,
        phases: int | None,
        seed: int,
        processes: Collective,
    ) -> None:
        self.prompts = prompts
        self.writer = writer
        self.objective = objective
        self.controller = controller
        self.method: PolicyGradient = objective.method
        self.samples = self.method.samples_per_prompt
        self.groups = batch_size // self.samples
        self.minibatches = rollout_size // batch_size
        self.phases = phases
        self.seed = seed
        self.processes = processes
        self.running = RunningMoments() if self.method.normalize_scores else None
        self.number = 0
        self.phase: Phase | None = None
        self._left = 0
        self._warned = False

    @property
    def total_steps(self) -> int | None:
        if self.phases is None:
            return None
        return self.phases * self.minibatches * self.method.inner_epochs

    @property
    def at_boundary(self) -> bool:
        """Whether the rollout has been learned from: what is left of it is not saved."""
        return self._left == 0 or self.objective.phase_over

    def __iter__(self) -> Iterator[Batch]:
        for prompts in self.prompts:
            self.number += 1
            self.objective.phase_over = False
            yield from self._phase(prompts)

    def _phase(self, prompts: Batch) -> Iterator[Batch]:
        rollout = self._rollout(prompts)
        self._left = self.minibatches * self.method.inner_epochs
        for epoch in range(self.method.inner_epochs):
            for chosen in self._order(epoch):
                self._left -= 1  # a checkpoint taken while this one is worked on is taken after it
                yield self._share(rollout, chosen)[0]
                if self.objective.phase_over:
                    self._left = 0
                    return

    # --- minibatches -------------------------------------------------------------------------

    def _order(self, epoch: int) -> list[list[int]]:
        """The groups of each minibatch of an epoch."""
        num = self.minibatches * self.groups
        drawn = generator("minibatches", self.seed, self.number, epoch).permutation(num).tolist()
        return [drawn[start : start + self.groups] for start in range(0, num, self.groups)]

    def _share(self, rollout: Batch, chosen: Sequence[int]) -> tuple[Batch, list[int]]:
        """This process's share of a minibatch, and the places of its answers in the rollout."""
        rank, size, num = self.processes.rank, self.processes.size, len(chosen)
        positions = range(rank * num // size, (rank + 1) * num // size)
        if not positions:  # a copy keeps the process in step
            return replace(
                rollout.select(chosen[:1]), position=torch.zeros(1, dtype=torch.int64)
            ).absent(), []
        own = [chosen[position] for position in positions]
        batch = replace(rollout.select(own), position=torch.tensor(list(positions)))
        places = [group * self.samples + k for group in own for k in range(self.samples)]
        return batch, places

    # --- a rollout ---------------------------------------------------------------------------

    def _rollout(self, prompts: Batch) -> Batch:
        answers = self.writer.answer(prompts, self.samples, self.number, self.processes)
        self._warn_of_cut(answers)
        if bool(answers.scores[""].isnan().all()):
            raise DataError(
                f"The reward gave no score to any of the {len(answers.ended)} answers of rollout "
                f"{self.number}, so there is nothing to learn from. Look at the reward; the run "
                "goes on from its last checkpoint."
            )
        looked = self._look(answers)
        coefficient = self.controller.value
        found = credit(self.method, looked, coefficient, self.running)
        measured, kl = measure(answers, looked)
        if looked.reference_logps is not None:
            self.controller.update(kl, len(looked.scores))
        tokens = {
            "mask": found.mask,
            "old_logps": looked.old_logps,
            "advantages": found.advantages,
        }
        if found.returns is not None and looked.values is not None:
            tokens |= {"returns": found.returns, "values": looked.values}
        if looked.reference_logps is not None:
            tokens["reference_logps"] = looked.reference_logps
        both = looked.old_logps, answers.sampled_logps, answers.mask()
        if not self.writer.exact:
            # Every policy loss is linear in the advantages, so the weights go there.
            tokens["advantages"] = found.advantages * truncated_importance(*both)
        apart = {name: float(value) for name, value in mismatch(*both).items()}
        phase = {"objective/kl_coef": coefficient, **found.phase, **health(answers, self.samples)}
        phase |= apart
        self.phase = Phase(self.number, table(answers, measured))
        experience = Experience(tokens, {**measured, **found.answers}, phase)
        return replace(answers.batch, experience=experience)

    def _warn_of_cut(self, answers: Answers) -> None:
        """Once: most scores do not count."""
        cut = 1 - float(answers.ended.double().mean())
        if self.method.truncation == "bootstrap" and cut > 0.5 and not self._warned:
            self._warned = True
            log.warning(
                "Rollout %d: %.0f %% of the answers were cut by max_new_tokens, and the score of "
                "an answer that has not ended does not count under truncation='bootstrap'. Raise "
                "generation.max_new_tokens, or write truncation='as_end'.",
                self.number,
                100 * cut,
            )

    def _look(self, answers: Answers) -> Looked:
        """In the minibatches of the first epoch, so that there the ratio is 1 to the last bit."""
        rollout, mask = answers.batch, answers.mask()
        ends = self.method.truncation == "bootstrap"
        tables, places = [], []
        for chosen in self._order(0):
            batch, own = self._share(rollout, chosen)
            cut = ~answers.ended.view(-1, self.samples)[chosen]
            found = self.objective.look(batch, ends=ends and bool(cut.any()))
            tables.append(_as_table(found, self.objective.looks, mask.shape[1])[: len(own)])
            places += own
        order = self.processes.gather(torch.tensor(places, dtype=torch.int64)).argsort()
        whole = self.processes.gather(torch.cat(tables))[order]
        held = dict(zip(self.objective.looks, whole.unbind(1), strict=True))
        finals = held.pop("final_values", None)
        return Looked(
            scores=answers.scores[""],
            ended=answers.ended,
            mask=mask,
            samples=self.samples,
            final_values=None if finals is None else finals[:, 0],
            **held,
        )

    # --- the rest of a source ----------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What the report says of the data."""
        return {**self.prompts.facts(), "rollouts": self.number}

    def state_dict(self) -> dict[str, Any]:
        assert self.at_boundary, "a rollout in the middle of being learned from is not saved"
        return {
            "prompts": self.prompts.state_dict(),
            "number": self.number,
            "controller": self.controller.state_dict(),
            "running": None if self.running is None else self.running.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.prompts.load_state_dict(state["prompts"])
        self.number = state["number"]
        self.controller.load_state_dict(state["controller"])
        if self.running is not None:
            self.running.load_state_dict(state["running"])


def _as_table(found: Mapping[str, Tensor], names: Sequence[str], width: int) -> Tensor:
    """(N, F, T) of what was looked at; a number per answer stands in the first column."""
    held = []
    for name in names:
        value = found.get(name)
        if value is None:
            value = next(iter(found.values())).new_zeros(len(next(iter(found.values()))), 1)
        value = value[:, None] if value.ndim == 1 else value
        held.append(torch.nn.functional.pad(value, (0, width - value.shape[1])))
    return torch.stack(held, 1)
