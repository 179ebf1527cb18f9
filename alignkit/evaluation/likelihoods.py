"""What model and opponent say of answers that are there: accuracies, margins, drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from alignkit.bank import Repeated
from alignkit.capabilities import DrawsInStrata
from alignkit.examples import Examples
from alignkit.facts import EvaluationRow
from alignkit.intervals import Floats
from alignkit.objectives.preference import PreferenceObjective
from alignkit.rows import Row
from alignkit.sources import RowSource
from alignkit.statistics import mean, preference_rate, preferences

Measures = dict[str, EvaluationRow]
"""Key in JSON -> the row of the page, most important first."""

ROWS_AT_ONCE = 64


@dataclass
class PairNumbers:
    """Of P pairs on D draws each, everything (P, D), in the data's order.

    Attributes:
        row_id: (P,) the pairs' rows.
        chosen, rejected: log-ratios of model to opponent.
        own: per-token log-likelihood of chosen and rejected under the opponent.
        strata: names of the strata; stratum: (P, D) which one a draw is from.
    """

    row_id: np.ndarray
    chosen: Floats
    rejected: Floats
    own: tuple[Floats, Floats]
    strata: tuple[str, ...] = ()
    stratum: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=int))


@torch.no_grad()
def pair_numbers(
    objective: PreferenceObjective, examples: Examples, draws: int, runtime: Any
) -> PairNumbers:
    """Score every pair on `draws` fixed draws of its own."""
    source = RowSource(
        examples if draws == 1 else Repeated(examples, draws),
        batch_size=ROWS_AT_ONCE * draws,
        epochs=1,
        seed=0,
        processes=runtime,
        shuffle=False,
    )
    columns: dict[str, list[Any]] = {}
    names: tuple[str, ...] = ()
    seen = 0
    for batch in source.once():
        placed = replace(batch, position=batch.position + seen)
        seen += batch.num_groups
        for micro in objective.micro_batches(placed, 0):
            scores = objective.scores(micro)
            found = {
                "position": micro.batch.position,
                "row_id": micro.batch.row_id,
                "chosen": scores.chosen,
                "rejected": scores.rejected,
                "own_chosen": scores.reference_chosen / scores.chosen_length,
                "own_rejected": scores.reference_rejected / scores.rejected_length,
            }
            if isinstance(objective.backend, DrawsInStrata):
                names, found["stratum"] = objective.backend.strata(micro.batch, micro.key)
            for name, values in found.items():
                columns.setdefault(name, []).extend(values.tolist())
    order = np.argsort(columns.pop("position"), kind="stable")
    table = {name: np.array(values)[order].reshape(-1, draws) for name, values in columns.items()}
    return PairNumbers(
        table["row_id"][:, 0],
        table["chosen"],
        table["rejected"],
        (table["own_chosen"], table["own_rejected"]),
        names,
        table.get("stratum", np.zeros((0, 0), dtype=int)),
    )


def pair_measures(
    found: PairNumbers, prompts: Sequence[Any], error_scale: float | None, **how: Any
) -> Measures:
    """Held-out accuracy, margin and drift.

    Args:
        found: the pairs.
        prompts: of each pair; pairs of one prompt are resampled together.
        error_scale: from a log-ratio to a denoising error; None for text.
        how: confidence, resamples and seed of the intervals.
    """
    draws = found.chosen.shape[1]
    chosen, rejected = found.chosen.mean(axis=1), found.rejected.mean(axis=1)
    margin = found.chosen - found.rejected
    note = f"mean margin over {draws} fixed draws of timestep and noise" if draws > 1 else ""
    how = {"prompts": prompts, **how}
    right = preference_rate(preferences(rejected, chosen), **how)
    measures = {
        "accuracy": EvaluationRow.of(
            "held-out accuracy: chosen gained more than rejected", right, note=note
        )
    }
    for number, name in enumerate(found.strata):
        inside = np.where(found.stratum == number, margin, np.nan)
        if not np.isnan(inside).all():
            means = _mean_inside(inside)
            values = np.where(np.isnan(means), np.nan, (means > 0) + 0.5 * (means == 0))
            row = EvaluationRow.of(
                f"accuracy at timesteps {name[1:]}", preference_rate(values, **how)
            )
            measures[f"accuracy/{name}"] = row
    unit = "nats" if error_scale is None else ""
    margins = mean(margin.mean(axis=1), **how)
    measures["margin"] = EvaluationRow.of("held-out margin of log-ratios", margins, unit=unit)
    for side, values in (("chosen", chosen), ("rejected", rejected)):
        if error_scale is None:
            row = EvaluationRow.of(
                f"log-ratio of {side} answers", mean(values, **how), unit=unit, better=None
            )
            measures[f"log_ratio/{side}"] = row
        else:
            row = EvaluationRow.of(
                f"denoising error of {side} pictures above the opponent's",
                mean(error_scale * values, **how),
                better="lower" if side == "chosen" else None,
            )
            measures[f"error/{side}"] = row
    return measures


def _mean_inside(values: Floats) -> Floats:
    """Row means of what is there; NaN for rows without any."""
    there = ~np.isnan(values)
    count = there.sum(axis=1)
    sums = np.where(there, values, 0.0).sum(axis=1)
    return np.where(count > 0, sums / np.maximum(count, 1), np.nan)


def same_tokens(*tokenizers: Any) -> bool:
    """Whether both read and write the same ids; pictures have none."""
    first, *rest = tokenizers
    return all(
        one is first or (first is not None and one.get_vocab() == first.get_vocab()) for one in rest
    )


def prompt_key(row: Row) -> str:
    """What pairs of one prompt share; a pair without a prompt column is its own."""
    for column in ("prompt", "prompt_ids", "caption"):
        if column in row:
            return repr(row[column])
    return repr(row)
