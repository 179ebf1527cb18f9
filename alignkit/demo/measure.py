"""What the demo measures of a run: win rates by a known reward, and how far the policy moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from alignkit.evaluate import paired_difference, win_rate
from alignkit.facts import EvaluationRow
from alignkit.run import Run
from alignkit.sources import RowSource


def win_row(
    prompts: Sequence[Any],
    before: Sequence[Any],
    after: Sequence[Any],
    reward: Callable[[Any, Any], float],
) -> EvaluationRow:
    """Win rate of the aligned model's answers over the base's, prompt by prompt, ties half."""
    scores = [
        [reward(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        for answers in (before, after)
    ]
    return EvaluationRow.of("win rate over the base, by the known reward", win_rate(*scores))


def mean_row(measure: str, values: Sequence[float], *, unit: str, note: str) -> EvaluationRow:
    """A mean with its interval, of something that has no good or bad direction."""
    found = paired_difference([0.0] * len(values), values)
    return EvaluationRow(
        measure=measure,
        value=found.value,
        low=found.low,
        high=found.high,
        num=found.num,
        unit=unit,
        note=note,
    )


@torch.no_grad()
def likelihoods(run: Run, rows: Any, options: Any) -> dict[str, list[float]]:
    """Per pair, what policy and reference say of both answers, on draws that training never used.

    Keys: log_ratio_chosen, log_ratio_rejected, and the reference's log-likelihood per token of both
    (reference_chosen, reference_rejected).
    """
    examples = run.wing.examples(rows, options, kind="pairs", seed=run.config.seed)
    source = RowSource(
        examples, batch_size=64, epochs=1, seed=0, processes=run.runtime, shuffle=False
    )
    objective: Any = run.trainer.objective
    found: dict[str, list[float]] = {}
    for batch in source.once():
        for micro in objective.micro_batches(batch, 0):
            scores = objective.scores(micro)
            values = {
                "log_ratio_chosen": scores.chosen,
                "log_ratio_rejected": scores.rejected,
                "reference_chosen": scores.reference_chosen / scores.chosen_length,
                "reference_rejected": scores.reference_rejected / scores.rejected_length,
            }
            for name, value in values.items():
                found.setdefault(name, []).extend(value.tolist())
    return found
