"""Held-out prompts of an online run: the policy answers them, and the reward scores the answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from alignkit.answering import Writer
from alignkit.batches import Batch, Experience
from alignkit.credit import Looked
from alignkit.objectives.policy_gradient import PolicyGradientObjective
from alignkit.protocols import Collective
from alignkit.rollout_measures import measure
from alignkit.sources import RowSource


class HeldOutPrompts:
    """Answers to held-out prompts as batches to evaluate: their scores, lengths and KL.

    The draws are the same at every evaluation, so that what changes is the policy.

    Args:
        prompts: batches of prompts, all of them on every process.
        writer: answers and scores them.
        objective: looks at them.
        processes: rank and size.
    """

    def __init__(
        self,
        prompts: RowSource,
        writer: Writer,
        objective: PolicyGradientObjective,
        processes: Collective,
    ) -> None:
        self.prompts = prompts
        self.writer = writer
        self.objective = objective
        self.processes = processes

    def once(self) -> Iterator[Batch]:
        for prompts in self.prompts.once():
            answers = self.writer.answer(prompts, 1, 0, self.processes)
            own = list(answers.share)
            absent = not own
            batch = answers.batch.select(own or [0])
            batch = replace(batch, position=torch.tensor(own or [0]))
            batch = batch.absent() if absent else batch
            found = self.objective.look(batch)
            places = torch.tensor(own or [0])
            mask = answers.mask()[places][:, : next(iter(found.values())).shape[1]]
            looked = Looked(
                answers.scores[""][places],
                answers.ended[places],
                mask,
                found["old_logps"],
                found.get("reference_logps"),
            )
            measured, _ = measure(answers, looked, places, found["entropy"])
            yield replace(batch, experience=Experience({"mask": mask}, measured, {}))
