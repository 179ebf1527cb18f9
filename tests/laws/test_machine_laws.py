"""Laws of the whole machine, from rows to gradients, over every loss and both wings."""

from __future__ import annotations

import math
from typing import Any

import pytest

from alignkit import DPO, LoRA, TrainerOptions, align
from alignkit.losses import PREFERENCE_LOSSES
from tests.laws.machine import ROWS, SIDES, Step, distance, first_step, names, policies

QUICK = {"sigmoid"}
"""Losses whose cases belong to the fast tier."""
ROUNDING = 2e-5


def cases(*wings: str) -> list[Any]:
    return [
        pytest.param(wing, name, marks=() if name in QUICK else pytest.mark.slow)
        for wing in wings
        for name in names(wing)
    ]


def assert_same_step(found: Step, expected: Step) -> None:
    assert found.record["loss"] == pytest.approx(expected.record["loss"], rel=ROUNDING)
    assert distance(found, expected) < ROUNDING
    metrics = {k for k in expected.record if "/" in k}
    assert metrics == {k for k in found.record if "/" in k} and metrics
    for name in metrics:
        assert found.record[name] == pytest.approx(expected.record[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(("wing", "name"), cases("text", "image"))
def test_training_starts_at_the_reference_and_moves(wing: str, name: str) -> None:
    row = PREFERENCE_LOSSES[name]
    policy, _ = policies(wing)
    history = align(
        policy,
        DPO(loss=name),
        ROWS[wing](),
        adapter=LoRA(rank=4) if wing == "image" else None,
        trainer=TrainerOptions(max_steps=3, batch_size=8, learning_rate=1e-2, log_every=1),
    ).history
    assert len(history) == 3 and all(math.isfinite(v) for line in history for v in line.values())
    first, _, last = history
    assert first["grad_norm"] > 0 and first["loss"] != last["loss"]
    if row.needs_reference:
        assert first["rewards/margins"] == first["rewards/chosen"] == 0, "to the last bit"
        assert first["rewards/accuracies"] == 0.5
        if "step0" in row.laws:
            start = row.at_reference(row.betas[wing].value)
            assert first["loss"] == pytest.approx(start, rel=1e-6)


@pytest.mark.parametrize(("wing", "name"), cases("text", "image"))
def test_splits_change_nothing(wing: str, name: str) -> None:
    rows = [
        row | {"weight": weight}
        for row, weight in zip(ROWS[wing](), [1, 2, 1, 0.5, 1, 0, 1, 3], strict=True)
    ]
    whole = first_step(wing, PREFERENCE_LOSSES[name], rows, micro_batch=8)
    for micro in (4, 1):
        assert_same_step(first_step(wing, PREFERENCE_LOSSES[name], rows, micro_batch=micro), whole)


@pytest.mark.parametrize(("wing", "name"), cases("text", "image"))
def test_exchanged_sides_with_the_opposite_probability_are_the_same_pair(
    wing: str, name: str
) -> None:
    law, (chosen, rejected) = PREFERENCE_LOSSES[name], SIDES[wing]
    rows = [row | {"p_chosen": 0.1 + 0.1 * i} for i, row in enumerate(ROWS[wing]())]
    other = [
        row | {chosen: row[rejected], rejected: row[chosen], "p_chosen": 1 - row["p_chosen"]}
        for row in rows
    ]
    expected, found = first_step(wing, law, rows), first_step(wing, law, other)
    margin = expected.record["rewards/margins"]
    assert found.record["rewards/margins"] == pytest.approx(-margin, rel=1e-4) and margin != 0
    assert found.record["loss"] == pytest.approx(expected.record["loss"], rel=ROUNDING)
    assert distance(found, expected) < ROUNDING


@pytest.mark.parametrize(("wing", "name"), cases("text"))
def test_weight_0_is_no_row_and_weight_2_two(wing: str, name: str) -> None:
    weights = [1, 2, 0, 1, 0, 1, 2, 1]
    rows = ROWS[wing]()
    weighted = [row | {"weight": weight} for row, weight in zip(rows, weights, strict=True)]
    repeated = [row for row, weight in zip(rows, weights, strict=True) for _ in range(weight)]
    row = PREFERENCE_LOSSES[name]
    assert_same_step(first_step(wing, row, weighted), first_step(wing, row, repeated))


@pytest.mark.parametrize(("wing", "name"), cases("image"))
def test_a_row_of_weight_0_is_not_looked_at(wing: str, name: str) -> None:
    """Draws are keyed by place, so in images a row is not left out but replaced by others."""
    rows = ROWS[wing](10)
    chosen, rejected = SIDES[wing]
    weighted = [row | {"weight": float(i % 3)} for i, row in enumerate(rows[:8])]
    other = [
        row | {chosen: rows[8][chosen], rejected: rows[9][rejected]} if row["weight"] == 0 else row
        for row in weighted
    ]
    row = PREFERENCE_LOSSES[name]
    expected = first_step(wing, row, weighted)
    assert_same_step(first_step(wing, row, other), expected)
    unweighted = first_step(wing, row, [r | {"weight": 1.0} for r in weighted])
    assert distance(unweighted, expected) > 100 * ROUNDING
