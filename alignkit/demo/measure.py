"""What the demo measures of a run: win rates by a known reward, and how far the policy moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from alignkit.evaluation.likelihoods import PairNumbers, pair_numbers
from alignkit.facts import EvaluationRow
from alignkit.run import Run
from alignkit.statistics import win_rate


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


def likelihoods(run: Run, rows: Any, options: Any) -> PairNumbers:
    """What policy and reference say of pairs, on draws that training never used."""
    examples = run.wing.examples(rows, options, kind="pairs", seed=run.config.seed)
    objective: Any = run.trainer.objective
    return pair_numbers(objective, examples, options.eval_draws, run.runtime)
