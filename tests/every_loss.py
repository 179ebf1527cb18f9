"""What the two tests of "every loss trains this wing" share: rows for each kind, and the checks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from alignkit import DPO, KTO, LoRA, TrainerOptions, build
from alignkit.losses import LOSSES, UNPAIRED_LOSSES, GroupLoss, Loss

FEW = TrainerOptions(max_steps=3, learning_rate=1e-2, warmup=0, log_every=1)


def method_of(name: str, **options: Any) -> DPO | KTO:
    return KTO(name, **options) if name in UNPAIRED_LOSSES else DPO(name, **options)


def columns_of(row: Loss) -> dict[str, float]:
    """The columns that a loss cannot do without."""
    wanted: dict[str, float] = {
        "score_chosen": 2.0,  # one above the other, where odpo's offset is 0
        "score_rejected": 1.0,
        "p_chosen": 0.9,
    }
    return {name: value for name, value in wanted.items() if name in row.needs}


def trains(name: str, policy: Any, rows: list[dict[str, Any]], **options: Any) -> None:
    """Three steps of all rows in two pieces: at the reference first, then away from it, and every
    number finite.
    """
    row = LOSSES[name]
    trainer = replace(FEW, batch_size=len(rows), micro_batch=len(rows) // 2)
    method = method_of(name, **options)
    run = build(policy, method, rows, trainer=trainer, adapter=LoRA(rank=2, targets="attention"))
    start = {n: p.detach().clone() for n, p in run.trainer.parameters.items()}
    records = list(run.steps())
    assert len(records) == 3
    for record in records:
        assert all(map(math.isfinite, (record.loss, record.grad_norm, *record.metrics.values())))
        assert record.grad_norm > 0
    assert len({record.loss for record in records}) == 3
    assert any(not torch.equal(p, start[n]) for n, p in run.trainer.parameters.items())
    first = records[0]
    if row.needs_reference:
        for key in ("chosen", "rejected"):
            assert first.metrics[f"rewards/{key}"] == 0, "policy = reference, to the last bit"
    criterion = run.trainer.objective.criterion  # type: ignore[attr-defined]
    beta = criterion.beta
    assert beta == row.betas[run.wing.modality].value
    if "step0" in row.laws and row.at_reference is not None and not isinstance(row, GroupLoss):
        expected = torch.tensor(criterion.scale * row.at_reference(beta)).item()
        assert abs(first.loss - expected) <= 1e-6 * max(1.0, expected)
    # Away from the reference, rewards are measured.
    assert any(abs(v) > 0 for k, v in records[-1].metrics.items() if k.startswith("rewards/"))
