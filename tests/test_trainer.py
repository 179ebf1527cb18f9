"""The training loop: what a step is, what is measured when, and what stops it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from alignkit import LoRA, Trainer, TrainerOptions
from alignkit.errors import ConfigError, DataError, NonFiniteError
from alignkit.losses import PREFERENCE_LOSSES, PairScores, weighted_sum
from alignkit.objectives.criterion import Criterion
from alignkit.objectives.preference import PreferenceObjective
from alignkit.options import TextOptions
from alignkit.protocols import Trainable
from alignkit.reference import FrozenModel, SwitchedAdapter
from tests.builders import (
    Table,
    move,
    table_objective,
    table_source,
    text_wing,
    token_rows,
)

LN_2 = math.log(2)
ADAM_EPSILON = 1e-8


def trainer_of(num: int = 8, batch_size: int = 4, **options: Any) -> Trainer:
    source = {k: options.pop(k) for k in ("weight", "epochs", "examples", "seed") if k in options}
    objective = options.pop("objective", None) or table_objective(num)
    given = {"learning_rate": 0.1, "warmup": 0, "schedule": "constant", "log_every": 1, **options}
    return Trainer(objective, table_source(num, batch_size, **source), TrainerOptions(**given))


def weights(trainer: Trainer) -> Tensor:
    return trainer.objective.backend.module.logps.detach().clone()


# ---- what a step does


def test_two_steps_by_hand() -> None:
    """Adam on a table of log-likelihoods, with the arithmetic written out."""
    trainer = trainer_of(2, 2, epochs=2, learning_rate=0.1, max_grad_norm=100.0)
    start = weights(trainer).double()
    beta, value = 0.1, start.clone()
    first, second = torch.zeros(4).double(), torch.zeros(4).double()
    for step, record in enumerate(trainer.steps(), start=1):
        ratio = value - start
        margin = ratio[0::2] - ratio[1::2]
        loss = torch.log1p(torch.exp(-beta * margin)).mean()
        slope = -beta / (1 + torch.exp(beta * margin)) / 2
        gradient = torch.stack([slope, -slope], 1).flatten()
        assert record.step == step
        assert record.loss == pytest.approx(loss.item(), rel=1e-6)
        assert record.grad_norm == pytest.approx(gradient.norm().item(), rel=1e-5)
        assert record.learning_rate == 0.1
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        mean, spread = first / (1 - 0.9**step), (second / (1 - 0.999**step)).sqrt()
        value = value - 0.1 * mean / (spread + ADAM_EPSILON)
    torch.testing.assert_close(weights(trainer).double(), value, rtol=1e-5, atol=1e-6)


def test_everything_is_measured_before_the_update() -> None:
    trainer = trainer_of(8, 8, epochs=3, schedule="linear", warmup=1)
    records = trainer.fit()
    assert records[0].loss == torch.tensor(LN_2).item()
    assert records[0].metrics["rewards/margins"] == 0 and records[1].metrics["rewards/margins"] > 0
    assert [r.learning_rate for r in records] == pytest.approx([0.1, 0.1 * 2 / 3, 0.1 / 3])


def test_the_rate_reported_is_the_rate_used() -> None:
    trainer = trainer_of(8, 4, epochs=2, schedule="cosine", warmup=2)
    for record in trainer.steps():
        assert {g["lr"] for g in trainer.optimizer.param_groups} == {record.learning_rate}


def test_the_last_short_batch_is_a_step_of_its_own_mean() -> None:
    records = trainer_of(10, 4, epochs=1).fit()
    assert [r.step for r in records] == [1, 2, 3]
    # The table's rows are independent: each is at its reference until its own step.
    assert [r.loss for r in records] == [torch.tensor(LN_2).item()] * 3
    assert records[2].grad_norm == pytest.approx(0.05 * math.sqrt(2 * 2) / 2, rel=1e-5)


def test_micro_batches_accumulate_to_the_same_weights() -> None:
    found = []
    for budget in (8, 3, 1):
        objective = table_objective(8, budget=budget)
        trainer = trainer_of(8, 8, epochs=3, objective=objective)
        found.append(([r.loss for r in trainer.fit()], weights(trainer)))
    for losses, value in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-7)
        torch.testing.assert_close(value, found[0][1], rtol=1e-6, atol=1e-6)


def test_clipping_scales_the_gradient_and_reports_the_norm_before() -> None:
    plain, clipped = trainer_of(2, 2), trainer_of(2, 2, max_grad_norm=1e-3)
    seen: list[Tensor] = []
    table = clipped.objective.backend.module.logps
    clipped.optimizer.register_step_pre_hook(lambda *_: seen.append(table.grad.clone()))
    assert clipped.fit()[0].grad_norm == plain.fit()[0].grad_norm
    assert seen[0].norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_weights_divide_by_their_sum_over_the_batch() -> None:
    """With row weights the norm is that of weight / sum(weight), by hand."""
    trainer = trainer_of(4, 4, weight=[1.0, 0.0, 2.0, 5.0])
    (record,) = trainer.fit()
    expected = 0.05 * math.sqrt(2 * (1 + 4 + 25)) / 8
    assert record.grad_norm == pytest.approx(expected, rel=1e-5)
    assert record.loss == torch.tensor(LN_2).item()


def test_all_weights_zero_is_refused_before_anything_moves() -> None:
    trainer = trainer_of(4, 4, weight=[0.0] * 4)
    before = weights(trainer)
    with pytest.raises(DataError, match="step 1 have weight 0"):
        trainer.fit()
    assert torch.equal(weights(trainer), before)


def test_metrics_are_means_since_the_last_logged_step() -> None:
    every = trainer_of(8, 2, epochs=2, log_every=1).fit()
    trainer = trainer_of(8, 2, epochs=2, log_every=3)
    some = trainer.fit()
    assert [bool(r.metrics) for r in some] == [True, False, True, False, False, True, False, True]
    for last, since in ((3, (2, 3)), (6, (4, 5, 6)), (8, (7, 8))):
        expected = sum(every[s - 1].metrics["rewards/margins"] for s in since) / len(since)
        assert some[last - 1].metrics["rewards/margins"] == pytest.approx(expected, rel=1e-6)


def test_max_steps_bounds_an_endless_source_and_epochs_a_finite_one() -> None:
    assert len(trainer_of(3, 2, epochs=None, max_steps=7).fit()) == 7
    assert len(trainer_of(3, 2, epochs=2).fit()) == 3
    with pytest.raises(ConfigError, match="max_steps"):
        trainer_of(3, 2, epochs=None)


def test_no_batch_is_drawn_after_the_last_step() -> None:
    trainer = trainer_of(8, 2, epochs=None, max_steps=2)
    trainer.fit()
    assert trainer.source.consumed == 4


def test_a_loop_that_was_left_goes_on() -> None:
    whole = trainer_of(8, 2, epochs=2)
    expected = [r.loss for r in whole.fit()]
    trainer, found = trainer_of(8, 2, epochs=2), []
    for record in trainer.steps():
        found.append(record.loss)
        if record.step == 3:
            break
    found += [r.loss for r in trainer.steps()]
    assert found == expected and torch.equal(weights(trainer), weights(whole))


def test_a_trainer_without_a_rate_or_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match="learning rate"):
        Trainer(table_objective(2), table_source(2, 2), TrainerOptions())
    objective = table_objective(2)
    objective.backend.module.requires_grad_(False)
    with pytest.raises(ConfigError, match="Nothing is trained"):
        trainer_of(2, 2, objective=objective)


# ---- what stops it


def poisoned(row: int) -> Any:
    """DPO that is NaN on the pair with a known chosen log-likelihood."""
    objective = table_objective(8)
    mark = objective.reference.module.logps[2 * row].detach()

    def loss(scores: PairScores, *, beta: float) -> Tensor:
        plain = PREFERENCE_LOSSES["sigmoid"](scores, beta=beta)
        return torch.where(scores.reference_chosen == mark, plain * math.nan, plain)

    return loss


@pytest.mark.parametrize("budget", [8, 3, 1])
def test_a_bad_row_is_named_and_no_step_is_taken(budget) -> None:
    objective = table_objective(8, loss=poisoned(5), budget=budget)
    trainer = trainer_of(8, 4, epochs=1, objective=objective)
    records = []
    with pytest.raises(NonFiniteError, match=r"Rows whose loss is not finite: 5\. ") as error:
        for record in trainer.steps():
            records.append(record)
            before = weights(trainer)
    if not records:
        before = table_objective(8).backend.module.logps
    assert f"Step {len(records) + 1} stopped before its update" in str(error.value)
    assert torch.equal(weights(trainer), before)
    assert trainer.step == len(records)
    assert all(p.grad is None for p in trainer.parameters.values())


def test_a_gradient_that_is_not_finite_stops_too() -> None:
    def loss(scores: PairScores, *, beta: float) -> Tensor:
        # Finite at 0, with an infinite slope.
        return (scores.margin + 0).abs().sqrt()

    trainer = trainer_of(4, 4, objective=table_objective(4, loss=loss))
    before = weights(trainer)
    with pytest.raises(NonFiniteError, match=r"No single row.*held rows"):
        trainer.fit()
    assert torch.equal(weights(trainer), before)


def test_nan_in_one_embedding_names_the_rows_that_use_it() -> None:
    rows = token_rows(6)
    rows[4]["chosen_ids"] = [383, 383]
    rows = [r if i == 4 else without(r, 383) for i, r in enumerate(rows)]
    wing = text_wing("llama")
    examples = wing.examples(rows, TextOptions(), kind="pairs", seed=0)
    reference = FrozenModel.copy_of(wing.backend.module)
    objective = PreferenceObjective(
        wing.backend, reference, Criterion.of(PREFERENCE_LOSSES["sigmoid"], beta=0.1), budget=2
    )
    with torch.no_grad():
        wing.policy.get_input_embeddings().weight[383] = math.nan
    trainer = trainer_of(6, 6, objective=objective, examples=examples)
    with pytest.raises(NonFiniteError, match=r"Rows whose loss is not finite: 4\. "):
        trainer.fit()


def without(row: dict[str, Any], token: int) -> dict[str, Any]:
    return {key: [5 if i == token else i for i in ids] for key, ids in row.items()}


# ---- reads of the device


class Taint(TorchDispatchMode):
    """Marks what was computed from marked tensors, as everything on a device is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        if any(getattr(t, "on_device", False) for t in tensors):
            for result in tree_flatten(out)[0]:
                if isinstance(result, Tensor):
                    result.on_device = True
        return out


READS = ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero")


def count_reads(trainer: Trainer, monkeypatch: Any) -> list[int]:
    """Reads of device values per step: of tensors that descend from the parameters."""
    reads: list[str] = []
    for name in READS:
        original = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any, _name: str = name, _to: Any = original) -> Any:
            if getattr(self, "on_device", False):
                reads.append(_name)
            return _to(self, *args)

        monkeypatch.setattr(Tensor, name, counted)
    for parameter in trainer.objective.backend.module.parameters():
        parameter.on_device = True
    found, steps = [], trainer.steps()
    with Taint():
        for _ in range(trainer.total_steps):
            reads.clear()
            next(steps)
            found.append(len(reads))
    return found


@pytest.mark.parametrize("kind", ["table", "coupled", "text"])
def test_a_step_reads_the_device_once_and_a_logged_one_twice(monkeypatch, kind) -> None:
    options: dict[str, Any] = {"epochs": None, "max_steps": 6, "log_every": 3}
    if kind == "text":
        text = text_wing("llama", LoRA(rank=2))
        examples = text.examples(token_rows(8), TextOptions(), kind="pairs", seed=0)
        objective = PreferenceObjective(
            text.backend,
            SwitchedAdapter(text.backend, text.adapters_off),
            Criterion.of(PREFERENCE_LOSSES["sigmoid"], beta=0.1),
            budget=2,
        )
        trainer = trainer_of(8, 4, objective=objective, examples=examples, **options)
    else:
        # Two passes over the batch, a state, and no further read.
        coupled = weighted_sum({"aot": 1.0, "beta_dpo": 1.0}, PREFERENCE_LOSSES)
        loss = coupled if kind == "coupled" else PREFERENCE_LOSSES["sigmoid"]
        trainer = trainer_of(8, 4, objective=table_objective(8, loss=loss, budget=2), **options)
    assert count_reads(trainer, monkeypatch) == [2, 1, 2, 1, 1, 2]


# ---- parts of one's own


class Fit:
    """An objective that needs nothing of alignkit: a table is drawn to zero."""

    requires: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.module: nn.Module = Table(torch.tensor([3.0, -2.0]))
        self.steps: list[int] = []

    @property
    def trainable(self) -> Trainable:
        return Trainable({"table": self.module}, lambda name, module: None)

    def prepare(self, runtime: Any) -> None: ...

    def normaliser(self, batch: Any) -> Tensor:
        return torch.tensor(float(len(batch)))

    def micro_batches(self, batch: Any, step: int) -> list[Any]:
        return [[index] for index in batch]

    def absent(self, micro: Any) -> Any:
        return []

    def __call__(self, micro: Any) -> tuple[Tensor, Any]:
        loss = (self.module.logps[micro] ** 2).sum()
        return loss, {"square": (loss.detach(), torch.tensor(float(len(micro))))}

    def after_step(self, step: int) -> None:
        self.steps.append(step)

    def state_dict(self) -> dict[str, Any]:
        return {}


class Lists:
    """A source whose batches are plain lists."""

    at_boundary, total_steps = True, 60

    def __iter__(self) -> Any:
        return iter([[0, 1]] * 60)

    def state_dict(self) -> dict[str, Any]:
        return {}


def test_an_objective_and_a_source_of_ones_own() -> None:
    objective = Fit()
    options = TrainerOptions(learning_rate=0.1, schedule="constant", warmup=0, log_every=1)
    records = Trainer(objective, Lists(), options).fit()
    assert records[0].loss == (9 + 4) / 2 and records[0].metrics == {"square": 6.5}
    assert records[-1].loss < 1 and objective.steps == list(range(1, 61))


def test_a_loss_of_ones_own_follows_its_own_formula() -> None:
    def squared(scores: PairScores, *, beta: float) -> Tensor:
        return (beta * scores.margin - 1) ** 2

    trainer = trainer_of(2, 2, epochs=400, objective=table_objective(2, loss=squared))
    records = trainer.fit()
    assert records[0].loss == 1 and records[0].grad_norm == pytest.approx(0.2 * 2 / 2, rel=1e-5)
    assert records[-1].metrics["rewards/margins"] == pytest.approx(1, abs=0.02)


def test_a_loss_that_reduces_by_itself_is_refused() -> None:
    def reduced(scores: PairScores, *, beta: float) -> Tensor:
        return scores.margin.mean()

    with pytest.raises(ValueError, match="unreduced"):
        trainer_of(4, 4, objective=table_objective(4, loss=reduced)).fit()


# ---- evaluation and state


def test_evaluation_trains_nothing_and_sees_the_same_again() -> None:
    trainer = trainer_of(8, 4, log_every=100, epochs=3)
    steps = trainer.steps()
    next(steps), next(steps)
    before, source = weights(trainer), table_source(8, 3, shuffle=False)
    found = trainer.evaluate(source.once())
    assert found == trainer.evaluate(source.once())
    assert torch.equal(weights(trainer), before)
    ratio = before - trainer.objective.reference.module.logps
    margin = 0.1 * (ratio[0::2] - ratio[1::2]).double()
    assert found["rewards/margins"] == pytest.approx(margin.mean().item(), rel=1e-5)
    assert found["loss"] == pytest.approx(torch.log1p(torch.exp(-margin)).mean().item(), rel=1e-6)
    # The training metrics that wait for the next logged step are not mixed with it.
    quiet = trainer_of(8, 4, log_every=100, epochs=3)
    assert [r.metrics for r in steps][-1] == [r.metrics for r in quiet.fit()][-1]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_trainer_goes_on_from_its_state_bitwise(optimizer) -> None:
    options = {"epochs": 3, "optimizer": optimizer, "schedule": "cosine", "log_every": 4}
    whole = trainer_of(8, 2, **options)
    expected = whole.fit()
    begun = trainer_of(8, 2, **options)
    steps = begun.steps()
    for _ in range(5):
        next(steps)
    again = trainer_of(8, 2, **options)
    again.load_state_dict(begun.state_dict())
    found = again.fit()
    assert [(r.step, r.loss, r.grad_norm, r.learning_rate, r.metrics) for r in found] == [
        (r.step, r.loss, r.grad_norm, r.learning_rate, r.metrics) for r in expected[5:]
    ]
    assert torch.equal(weights(again), weights(whole))


def test_moving_the_table_is_seen_by_the_step() -> None:
    trainer = trainer_of(4, 4)
    move(trainer.objective.backend.module, scale=1.0)
    assert trainer.fit()[0].loss != torch.tensor(LN_2).item()
