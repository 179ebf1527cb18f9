"""Laws of the whole machine, from rows to gradients, over every loss and both wings."""

from __future__ import annotations

import math
from typing import Any

import pytest

from alignkit import DPO, LoRA, TrainerOptions, align
from alignkit.losses import LOSSES, Loss, PairLoss
from tests.laws.machine import (
    IMAGE_BETA,
    SIDES,
    Step,
    distance,
    first_step,
    first_step_of,
    losses_of,
    method_for,
    policies,
    rows_for,
)

QUICK = {"sigmoid", "aot", "kto", "plackett_luce"}
"""Losses whose text cases belong to the fast tier."""
ROUNDING, EFFECT = 1e-4, 1e-3
"""Relative distances of gradients: float32 sums in another order, and another function."""


def cases(*wings: str, law: str = "") -> list[Any]:
    """(wing, loss) for every loss that a wing trains with, or those of them that claim a law."""
    return [
        pytest.param(
            wing,
            loss,
            id=f"{wing}-{loss.name}",
            marks=() if quick(wing, loss) else pytest.mark.slow,
        )
        for wing in wings
        for loss in losses_of(wing)
        if not law or law in loss.laws
    ]


def quick(wing: str, loss: Loss) -> bool:
    return loss.name == "sigmoid" or (wing == "text" and loss.name in QUICK)


def _measured(step: Step) -> set[str]:
    """The metrics of what was learnt; how many positions were computed is the split's affair."""
    return {k for k in step.record if "/" in k and not k.startswith("positions/")}


def assert_same_step(found: Step, expected: Step) -> None:
    assert found.record["loss"] == pytest.approx(expected.record["loss"], rel=ROUNDING)
    assert distance(found, expected) < ROUNDING
    metrics = _measured(expected)
    assert metrics == _measured(found) and metrics
    for name in metrics:
        assert found.record[name] == pytest.approx(expected.record[name], rel=1e-4, abs=1e-5), name


def test_every_loss_is_here() -> None:
    text, image = ({loss.name for loss in losses_of(wing)} for wing in ("text", "image"))
    assert text | image == set(LOSSES) and text == set(LOSSES) - {"mapo"}
    assert image == {name for name, loss in LOSSES.items() if loss.scale_free} | {"mapo"}


@pytest.mark.parametrize(("wing", "loss"), cases("text", "image"))
def test_training_starts_at_the_reference_and_moves(wing: str, loss: Loss) -> None:
    policy, _ = policies(wing)
    rows = rows_for(wing, loss, answers=2)
    if isinstance(loss, PairLoss):  # what odpo calls undecided
        rows = [row | {"score_chosen": 1.0, "score_rejected": 0.0} for row in rows]
    history = align(
        policy,
        method_for(loss),
        rows,
        adapter=LoRA(rank=4) if wing == "image" else None,
        trainer=TrainerOptions(max_steps=3, batch_size=8, learning_rate=1e-2, log_every=1),
    ).history
    assert len(history) == 3 and all(math.isfinite(v) for line in history for v in line.values())
    first, _, last = history
    assert first["grad_norm"] > 0 and first["loss"] != last["loss"]
    if not loss.needs_reference:
        return
    rewards = {k: v for k, v in first.items() if k.startswith(("rewards/", "log_ratio/"))}
    assert rewards.pop("rewards/accuracies", 0.5) == 0.5
    assert set(rewards.values()) == {0.0}, "to the last bit"
    if "step0" in loss.laws:
        assert loss.at_reference is not None
        beta = loss.betas[wing].value
        # Squared losses are brought to beta 1's size where beta is in the thousands.
        start = loss.at_reference(beta) / (loss.size(beta) if wing == "image" else 1.0)
        assert first["loss"] == pytest.approx(start, rel=1e-6)


@pytest.mark.parametrize(("wing", "loss"), cases("text", "image"))
def test_splits_change_nothing(wing: str, loss: Loss) -> None:
    weights = [1, 2, 1, 0.5, 1, 0, 1, 3]
    rows = [
        row | {"weight": weight} for row, weight in zip(rows_for(wing, loss), weights, strict=True)
    ]
    whole = first_step(wing, loss, rows, micro_batch=8)
    for micro in (4, 1):
        assert_same_step(first_step(wing, loss, rows, micro_batch=micro), whole)


MODIFIED = {
    "text": [
        DPO(divergence="forward_kl"),
        DPO(divergence="js_divergence"),
        DPO(divergence="alpha", divergence_alpha=0.3),
        DPO(weighting="wpo"),
        DPO(ld_alpha=0.3),
        DPO(anchor=0.5),
        DPO(loss={"sigmoid": 0.8, "bco_pair": 0.2, "aot": 0.5}),
        DPO(loss="aot_unpaired", ld_alpha=0.3, anchor=0.5, divergence="js_divergence"),
    ],
    "image": [
        DPO(beta=IMAGE_BETA, timestep_weighting="min_snr"),
        DPO(beta=IMAGE_BETA, timestep_weighting="elbo"),
        DPO(beta=0.01, timestep_weighting="nats"),
        DPO(beta=IMAGE_BETA, safeguard=0.6),
        DPO(beta=IMAGE_BETA, anchor=0.5),
    ],
}
"""Methods with modifiers."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wing", "method"),
    [pytest.param(w, m, id=f"{w}-{m!r}") for w, methods in MODIFIED.items() for m in methods],
)
def test_modifiers_start_at_the_reference_and_no_split_changes_them(wing: str, method: DPO) -> None:
    rows = rows_for(wing, LOSSES["sigmoid"])
    policy, _ = policies(wing)
    trainer = TrainerOptions(max_steps=1, batch_size=8, learning_rate=1e-3)
    (first,) = align(policy, method, rows, trainer=trainer).history
    assert first["rewards/margins"] == first["rewards/chosen"] == 0 < first["grad_norm"]
    whole = first_step_of(wing, method, rows, micro_batch=8)
    assert_same_step(first_step_of(wing, method, rows, micro_batch=3), whole)
    plain = first_step_of(wing, DPO(beta=method.beta), rows)
    assert distance(plain, whole) > EFFECT, "options have an effect"


@pytest.mark.parametrize(("wing", "loss"), cases("text", "image", law="swap"))
def test_exchanged_sides_with_the_opposite_probability_are_the_same_pair(
    wing: str, loss: Loss
) -> None:
    chosen, rejected = SIDES[wing]
    rows = [row | {"p_chosen": 0.1 + 0.1 * i} for i, row in enumerate(rows_for(wing, loss))]
    other = [
        row | {chosen: row[rejected], rejected: row[chosen], "p_chosen": 1 - row["p_chosen"]}
        for row in rows
    ]
    expected, found = first_step(wing, loss, rows), first_step(wing, loss, other)
    margin = expected.record["rewards/margins"]
    assert found.record["rewards/margins"] == pytest.approx(-margin, rel=1e-4) and margin != 0
    assert found.record["loss"] == pytest.approx(expected.record["loss"], rel=ROUNDING)
    assert distance(found, expected) < ROUNDING


@pytest.mark.parametrize(("wing", "loss"), cases("text", law="weight"))
def test_weight_0_is_no_row_and_weight_2_two(wing: str, loss: Loss) -> None:
    if "kl" in loss.needs:
        pytest.skip("which answer meets which prompt depends on how many rows are shuffled")
    weights = [1, 2, 0, 1, 0, 1, 2, 1]
    rows = rows_for(wing, loss)
    weighted = [row | {"weight": weight} for row, weight in zip(rows, weights, strict=True)]
    repeated = [row for row, weight in zip(rows, weights, strict=True) for _ in range(weight)]
    assert_same_step(first_step(wing, loss, weighted), first_step(wing, loss, repeated))


@pytest.mark.parametrize(("wing", "loss"), cases("image"))
def test_a_row_of_weight_0_is_not_looked_at(wing: str, loss: Loss) -> None:
    """Draws are keyed by place, so in images a row is not left out but replaced by others."""
    rows = rows_for(wing, loss, 10)
    weighted = [row | {"weight": float(i % 3)} for i, row in enumerate(rows[:8])]
    other = [rows[9] | {"weight": 0.0} if row["weight"] == 0 else row for row in weighted]
    expected = first_step(wing, loss, weighted)
    assert_same_step(first_step(wing, loss, other), expected)
    unweighted = first_step(wing, loss, [row | {"weight": 1.0} for row in weighted])
    assert distance(unweighted, expected) > EFFECT
