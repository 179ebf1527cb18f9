"""The laws of preference training over the text wing: three architectures, three references."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.batches import Batch
from alignkit.losses import PREFERENCE_LOSSES
from alignkit.objectives.criterion import Criterion
from alignkit.objectives.preference import PreferenceObjective
from alignkit.options import LoRA, TextOptions
from alignkit.reference import FrozenModel, SwitchedAdapter
from tests.builders import loss_and_gradients, move, text_wing, token_rows

BETA = 0.1
ARCHITECTURES = {"qwen2": 0.0, "llama": 0.0, "gpt2": 0.1}
REFERENCES = ("lora, adapter off", "full, frozen copy", "lora, frozen copy")


@pytest.fixture(
    params=[(a, r) for a in ARCHITECTURES for r in REFERENCES], ids=lambda p: f"{p[0]}: {p[1]}"
)
def objective(request: Any) -> PreferenceObjective:
    """DPO with the policy at its reference."""
    architecture, kind = request.param
    adapter = LoRA(rank=4) if kind.startswith("lora") else None
    wing = text_wing(architecture, adapter, dropout=ARCHITECTURES[architecture])
    reference: Any = (
        SwitchedAdapter(wing.backend, wing.adapters_off)
        if kind.endswith("off")
        else FrozenModel.copy_of(wing.backend.module)
    )
    return PreferenceObjective(
        wing.backend, reference, Criterion.of(PREFERENCE_LOSSES["sigmoid"], beta=BETA), budget=8
    )


@pytest.fixture
def moved(objective: PreferenceObjective) -> PreferenceObjective:
    """The same with the policy away from its reference."""
    move(objective.backend.module)
    return objective


def make_batch(rows: list[dict[str, Any]] | None = None) -> Batch:
    rows = token_rows(8) if rows is None else rows
    examples = text_wing().examples(rows, TextOptions(identical_pairs="keep"), kind="pairs", seed=0)
    return examples.collate(range(len(rows)), [0] * len(rows))


BATCH = make_batch()


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    assert any(gradient.norm() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        gap = (found[name] - gradient).norm()
        assert gap <= 1e-5 * gradient.norm() + 1e-12, (name, float(gap), float(gradient.norm()))


@pytest.mark.parametrize("budget", [1, 3, 8, "auto"])
def test_policy_at_its_reference_has_margin_0_and_loss_ln_2_to_the_last_bit(
    objective, budget
) -> None:
    objective.budget = budget
    ln_2, total = torch.tensor(math.log(2)), 0.0
    for micro in objective.micro_batches(BATCH, step=1):
        scores = objective.scores(micro)
        assert (scores.margin == 0).all() and (scores.chosen == 0).all()
        losses = objective.criterion(scores)
        assert losses.dtype == torch.float32 and (losses == ln_2).all()
        summed, metrics = objective(micro)
        total += summed.item()
        value, count = metrics["rewards/accuracies"]
        assert value == 0.5 * count, "ties count one half"
    assert total / BATCH.num_groups == ln_2.item()


def test_a_row_of_weight_0_is_absent(moved) -> None:
    weight = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1])
    loss, gradients = loss_and_gradients(moved, replace(BATCH, weight=weight))
    kept = weight.nonzero().flatten().tolist()
    expected, expected_gradients = loss_and_gradients(moved, BATCH.select(kept))
    assert loss == pytest.approx(expected, rel=1e-6)
    assert_same_gradients(gradients, expected_gradients)


def test_a_row_of_weight_2_is_there_twice(moved) -> None:
    weight = torch.tensor([1.0, 2, 1, 1, 1, 1, 2, 1])
    loss, gradients = loss_and_gradients(moved, replace(BATCH, weight=weight))
    twice = BATCH.select([0, 1, 1, 2, 3, 4, 5, 6, 6, 7])
    moved.budget = 10
    expected, expected_gradients = loss_and_gradients(moved, twice)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert_same_gradients(gradients, expected_gradients)


@pytest.mark.parametrize("budget", [4, 3, 1, "auto"])
def test_micro_batches_change_nothing(moved, budget) -> None:
    batch = replace(BATCH, weight=torch.tensor([1.0, 2, 1, 0.5, 1, 0, 1, 3]))
    expected, expected_gradients = loss_and_gradients(moved, batch)
    moved.budget = budget
    loss, gradients = loss_and_gradients(moved, batch)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert_same_gradients(gradients, expected_gradients)


def test_swapped_rows_are_rows_with_p_chosen_0(moved) -> None:
    rows = token_rows(8)
    swapped = [
        {**row, "chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]}
        for row in rows
    ]
    loss, gradients = loss_and_gradients(moved, make_batch(swapped))
    opposite = make_batch([{**row, "p_chosen": 0.0} for row in rows])
    expected, expected_gradients = loss_and_gradients(moved, opposite)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert_same_gradients(gradients, expected_gradients)
    # Softplus is not even: the labels do matter.
    assert loss != pytest.approx(loss_and_gradients(moved, BATCH)[0], rel=1e-6)


def test_the_gradient_is_the_derived_factor_times_that_of_the_log_likelihood(moved) -> None:
    weight = torch.tensor([1.0, 2, 1, 0.5, 1, 1, 1, 3])
    _, gradients = loss_and_gradients(moved, replace(BATCH, weight=weight))
    module = moved.backend.module
    with torch.no_grad():
        reference = moved.reference.log_likelihood(BATCH, None, frozenset()).total.double()
        policy = module(BATCH).total.double()
    ratio = policy - reference  # chosen and rejected alternate
    margin = ratio[0::2] - ratio[1::2]
    factor = -BETA / (1 + torch.exp(BETA * margin)) * weight / weight.sum()
    per_answer = torch.stack([factor, -factor], dim=1).flatten().float()
    (module(BATCH).total * per_answer).sum().backward()
    expected = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    assert_same_gradients(gradients, expected)


def test_the_reference_gets_no_gradient_and_only_trained_parameters_do(moved) -> None:
    _, gradients = loss_and_gradients(moved, BATCH)
    module = moved.backend.module
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert set(gradients) == trained
    if isinstance(moved.reference, FrozenModel):
        assert not any(p.requires_grad for p in moved.reference.module.parameters())


def test_metrics_are_weighted_means_over_the_pairs(moved) -> None:
    weight = torch.tensor([1.0, 2, 1, 0.5, 1, 1, 1, 3])
    batch = replace(BATCH, weight=weight)
    (micro,) = moved.micro_batches(batch, step=1)
    _, metrics = moved(micro)
    with torch.no_grad():
        ratio = moved.backend.module(batch).total - moved.reference.log_likelihood(
            batch, None, frozenset()
        ).total.to(torch.float32)
    chosen, rejected = ratio[0::2], ratio[1::2]

    def mean(values: Tensor) -> float:
        return float((values * weight).sum() / weight.sum())

    expected = {
        "rewards/chosen": mean(BETA * chosen),
        "rewards/rejected": mean(BETA * rejected),
        "rewards/margins": mean(BETA * (chosen - rejected)),
        "rewards/accuracies": mean((chosen > rejected).float()),
    }
    for name, value in expected.items():
        total, count = metrics[name]
        assert float(total / count) == pytest.approx(value, rel=1e-4, abs=1e-7)
        assert not total.requires_grad
    assert {"logps/chosen", "logps/rejected"} <= metrics.keys()
