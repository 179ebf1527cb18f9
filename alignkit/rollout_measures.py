"""What is measured of a rollout: of its answers, of what they teach, and a few of them to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from alignkit.answering import Answers
from alignkit.credit import Looked
from alignkit.losses.kl import k3
from alignkit.losses.masked import masked_mean

TABLE = 8
"""Answers of each rollout that the report shows."""


def measure(
    answers: Answers, looked: Looked, places: Tensor | None = None, entropy: Tensor | None = None
) -> tuple[dict[str, Tensor], float]:
    """What is measured of whole answers, name -> (N,), and their mean KL to the reference.

    Args:
        answers: all of them.
        looked: those that are measured.
        places: which these are; None is all.
        entropy: (N, T), if it is not among what was looked at.
    """
    mask = looked.mask

    def of(values: Tensor) -> Tensor:
        return values if places is None else values[places]

    found = {
        ("objective/scores" + (f"/{name}" if name else "")): of(scores)
        for name, scores in answers.scores.items()
    }
    found["answers/length"] = mask.sum(-1).float()
    found["answers/ended"] = looked.ended.float()
    table = looked.entropy if entropy is None else entropy
    assert table is not None
    found["policy/entropy"] = masked_mean(table, mask, -1)
    if looked.reference_logps is None:
        return found, 0.0
    ratios = looked.log_ratios()
    found["objective/kl"] = ratios.sum(-1)
    found["objective/kl_k3"] = (k3(ratios) * mask).sum(-1)
    return found, float(found["objective/kl"].double().mean())


def health(answers: Answers, samples: int) -> dict[str, float]:
    """Shares of what teaches nothing."""
    scores = answers.scores[""]
    found = {"health/missing": float(scores.isnan().double().mean())}
    if samples > 1:
        spread = scores.view(-1, samples)
        same = (spread == spread[:, :1]).all(-1)
        found["health/equal_groups"] = float(same.double().mean())
    return found


def table(answers: Answers, measured: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    rows = []
    content = answers.batch.rows or ()
    samples = answers.batch.num_answers // answers.batch.num_groups
    for text, place in list(zip(answers.texts, answers.share, strict=True))[:TABLE]:
        score = float(answers.scores[""][place])
        row = {
            "prompt": content[place // samples]["prompt"],
            "answer": text,
            "score": None if score != score else score,
            "tokens": int(measured["answers/length"][place]),
            "cut": not bool(answers.ended[place]),
        }
        if "objective/kl" in measured:
            row["kl"] = float(measured["objective/kl"][place])
        rows.append(row)
    return rows
