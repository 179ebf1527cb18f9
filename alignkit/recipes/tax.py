"""The alignment tax: what a model knew before it was aligned, and still knows or not.

Three kinds of tasks that no reward speaks of (Ouyang et al. 2022, 2203.02155, section 4.2, in
small): which of several answers is the likeliest, whether a greedy answer is the right one to the
letter, and how well text is predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from alignkit.batches import Batch, Likelihood
from alignkit.errors import DataError
from alignkit.facts import EvaluationRow
from alignkit.options import GenerationOptions, TextOptions
from alignkit.protocols import Wing
from alignkit.rows import Row, read_rows
from alignkit.statistics import paired_difference

AT_ONCE = 64


@dataclass(frozen=True)
class Tasks:
    """Held-out tasks, each a set of rows.

    Attributes:
        multiple_choice: `prompt`, `choices` (two or more answers) and `answer`, which of them is
            right, from 0.
        exact_match: `prompt` and `answer`, a string.
        text: rows of `text`, or demonstrations.
    """

    multiple_choice: Sequence[Row] = ()
    exact_match: Sequence[Row] = ()
    text: Sequence[Row] = ()

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Tasks:
        """From the data of each set, as `align` takes it."""
        return cls(**{name: list(read_rows(data)) for name, data in given.items()})


Tax = dict[str, np.ndarray]
"""Name of the measure -> one number per task."""


@torch.no_grad()
def measure(wing: Any, tasks: Tasks, generation: GenerationOptions) -> Tax:
    """What a policy makes of the tasks.

    Returns:
        "multiple choice" and "exact match", 1 where right; "loss per token", nats.
    """
    found: Tax = {}
    if tasks.multiple_choice:
        found["multiple choice"] = np.array([float(right) for right in _choices(wing, tasks)])
    if tasks.exact_match:
        prompts = [row["prompt"] for row in tasks.exact_match]
        greedy = replace(generation, temperature=0.0)
        answers = wing.sample(prompts, greedy, seed=0)
        pairs = zip(answers, tasks.exact_match, strict=True)
        found["exact match"] = np.array([float(a.strip() == r["answer"].strip()) for a, r in pairs])
    if tasks.text:
        likelihoods = _likelihoods(wing, tasks.text, "supervised")
        found["loss per token"] = np.array([-float(t[0] / n[0]) for t, n in likelihoods])
    return found


def _choices(wing: Any, tasks: Tasks) -> Iterator[bool]:
    """Whether the right answer is the likeliest, by the sum over its tokens."""
    rows = []
    for number, row in enumerate(tasks.multiple_choice):
        choices, answer = row.get("choices"), row.get("answer")
        if not isinstance(choices, Sequence) or not isinstance(answer, int):
            raise DataError(
                f"Task {number} of multiple choice needs `choices`, a list of answers, and "
                f"`answer`, which is right, from 0; got {choices!r} and {answer!r}."
            )
        ranking = [int(place != answer) for place in range(len(choices))]
        rows.append({"prompt": row["prompt"], "responses": list(choices), "ranking": ranking})
    for row, (totals, _) in zip(rows, _likelihoods(wing, rows, "groups"), strict=True):
        yield row["ranking"][int(totals.argmax())] == 0


def _likelihoods(
    wing: Any, rows: Sequence[Row], kind: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(K,) log-likelihoods and (K,) tokens of the answers of each row, in order."""
    examples = wing.examples(
        [dict(row) for row in rows], TextOptions(identical_pairs="keep"), kind=kind, seed=0
    )
    if len(examples) != len(rows):
        raise DataError(
            f"{len(rows) - len(examples)} of {len(rows)} tasks cannot be read as rows of {kind!r}: "
            f"{dict(examples.skipped)}."
        )
    for start in range(0, len(rows), AT_ONCE):
        places = list(range(start, min(start + AT_ONCE, len(rows))))
        whole: Batch = examples.collate(places, [0] * len(places))
        told: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for piece in wing.backend.split(whole, "auto"):
            found: Likelihood = wing.backend.module(piece, None, frozenset())
            for group, row in enumerate(piece.row_id.tolist()):
                here = (piece.group == group).nonzero().flatten()
                told[row] = found.total[here].cpu(), found.length[here].cpu()
        yield from (told[row] for row in whole.row_id.tolist())


def compared(before: Tax, after: Tax) -> list[EvaluationRow]:
    """What was gained or lost, task by task, with intervals."""
    rows = []
    for name, values in after.items():
        worse_above = name == "loss per token"
        rows.append(
            EvaluationRow.of(
                f"alignment tax: {name}",
                paired_difference(before[name].tolist(), values.tolist()),
                unit="nats" if worse_above else "",
                better="lower" if worse_above else "higher",
                note="of tasks that no reward speaks of, after less before",
            )
        )
    return rows


def measured(wing: Wing, tasks: Tasks, generation: GenerationOptions, before: Tax) -> list[Any]:
    """`compared` with what the policy makes of the tasks now."""
    return compared(before, measure(wing, tasks, generation))
