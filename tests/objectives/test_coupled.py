"""Losses that couple the batch see the global batch, however it is cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.batches import Batch
from alignkit.draws import generator
from alignkit.losses import LOSSES, PairScores, UnpairedScores, weighted_sum
from alignkit.objectives.criterion import Criterion
from alignkit.objectives.preference import PreferenceObjective
from alignkit.reference import FrozenModel
from tests.builders import Cells, TableBackend, loss_and_gradients

BETA = 0.3
COUPLED = [name for name, row in LOSSES.items() if row.coupled or row.update]
NUM = 16
WEIGHTS = torch.tensor([1.0, 2, 0, 0.5] * 4)


def values(seed: int) -> Tensor:
    return 3 * torch.randn(2 * NUM, generator=torch.Generator().manual_seed(seed)) - 10


def batch_of(name: str, weight: Tensor | None = None) -> Batch:
    """Sixteen pairs of a table's cells, or sixteen single answers with the others mismatched."""
    groups = torch.arange(NUM)
    columns: dict[str, Any] = {"position": groups, "row_id": groups + 100, "weight": weight}
    if criterion(name).kind.rows == "pairs":
        return Batch(
            content=Cells(tuple(range(2 * NUM))),
            group=torch.arange(2 * NUM) // 2,
            rank=torch.arange(2 * NUM) % 2,
            **columns,
        )
    single = Batch(
        content=Cells(tuple(range(NUM))),
        group=groups,
        rank=torch.full((NUM,), -1),
        desirable=groups % 3 > 0,
        **columns,
    )
    return replace(single, mismatched=replace(single, content=Cells(tuple(range(NUM, 2 * NUM)))))


def criterion(name: str, **keywords: Any) -> Criterion:
    return Criterion.of(LOSSES[name], beta=BETA, **keywords)


def objective_of(name: str, budget: int = NUM, **keywords: Any) -> PreferenceObjective:
    backend = TableBackend(values(0))
    reference = FrozenModel(TableBackend(values(1)).module)
    return PreferenceObjective(backend, reference, criterion(name, **keywords), budget=budget)


def by_hand(
    name: str, weight: Tensor | None, state: Any = None, step: int = 1
) -> tuple[float, Tensor]:
    """Mean loss and gradient of the table in float64, from all rows at once."""
    table, fixed = values(0).double().requires_grad_(), values(1).double()
    keep = torch.arange(NUM) if weight is None else weight.nonzero().flatten()
    given = None if weight is None else weight[keep].double()
    scores: Any
    if criterion(name).kind.rows == "pairs":
        w, ell = 2 * keep, 2 * keep + 1
        drawn = [generator("pair", 0, step, i).random() for i in keep.tolist()]
        scores = PairScores(
            table[w],
            table[ell],
            fixed[w],
            fixed[ell],
            weight=given,
            uniform=torch.tensor(drawn).double(),
        )
    else:
        kl = (table.detach() - fixed)[NUM:]
        scores = UnpairedScores(table[keep], fixed[keep], keep % 3 > 0, weight=given, kl=kl[keep])
    losses = LOSSES[name](scores, beta=BETA, state=state)
    mean = losses.mean() if given is None else (losses * given).sum() / given.sum()
    mean.backward()
    return mean.item(), table.grad


@pytest.mark.parametrize("weight", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("budget", [16, 8, 5, 1])
@pytest.mark.parametrize("name", COUPLED)
def test_no_split_changes_the_loss_or_its_gradient(name, budget, weight) -> None:
    objective = objective_of(name, budget)
    loss, gradients = loss_and_gradients(objective, batch_of(name, weight))
    expected, gradient = by_hand(name, weight)
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradients["logps"].double(), gradient, rtol=1e-4, atol=1e-7)
    assert gradients["logps"].norm() > 0


@pytest.mark.parametrize("name", COUPLED)
def test_the_split_that_couples_nothing_gives_another_loss(name) -> None:
    """Were each piece a batch of its own, the numbers would differ: the tests above can fail."""
    whole, _ = loss_and_gradients(objective_of(name), batch_of(name))
    objective, total = objective_of(name), 0.0
    for place in range(NUM):
        (micro,) = objective.micro_batches(batch_of(name).select([place]), step=1)
        total += objective(micro)[0].item() / NUM
    assert total != pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("budget", [16, 4])
@pytest.mark.parametrize("name", [n for n in COUPLED if LOSSES[n].update])
def test_the_state_moves_once_per_training_step_and_survives_a_checkpoint(name, budget) -> None:
    objective, batch, state = objective_of(name, budget), batch_of(name), {}
    row, losses = LOSSES[name], []
    for step in (1, 2, 3):
        start = objective_of(name)
        with torch.no_grad():
            scores = start.scores(start.micro_batches(batch, step)[0])
        shifted = _shifted(scores, step - 1)
        state = row.next_state(shifted, state, beta=BETA)
        expected = float(row(shifted, beta=BETA, state=state).double().mean())
        with torch.no_grad():
            objective.backend.module.logps[:NUM] += 0.5 * (step > 1)
        total = summed(objective, batch, step) / NUM
        assert total == pytest.approx(expected, rel=1e-5)
        objective.after_step(step)
        losses.append(total)
        for key, value in state.items():
            torch.testing.assert_close(objective.state[key], value, rtol=1e-6, atol=1e-8)
        # An evaluation sees the state as it stands and leaves it.
        before = {k: v.clone() for k, v in objective.state.items()}
        for micro in objective.micro_batches(batch, 0):
            objective.evaluate(micro)
        objective.after_step(step)
        assert all(torch.equal(objective.state[k], v) for k, v in before.items())
    assert len(set(losses)) == 3
    again = objective_of(name, budget)
    with torch.no_grad():
        again.backend.module.logps.copy_(objective.backend.module.logps)
    again.load_state_dict(objective.state_dict())
    assert summed(objective, batch, 4) == summed(again, batch, 4)


@torch.no_grad()
def summed(objective: PreferenceObjective, batch: Batch, step: int) -> float:
    return sum(objective(micro)[0].item() for micro in objective.micro_batches(batch, step))


def _shifted(scores: Any, times: int) -> Any:
    """What the table's scores are after its first NUM cells rose `times` times by 0.5."""
    rise = 0.5 * times
    if isinstance(scores, UnpairedScores):
        return replace(scores, policy=scores.policy + rise)
    half = torch.arange(NUM) < NUM // 2
    return replace(
        scores,
        policy_chosen=scores.policy_chosen + rise * half,
        policy_rejected=scores.policy_rejected + rise * half,
    )


@pytest.mark.parametrize("name", COUPLED)
def test_a_piece_that_is_absent_adds_nothing(name) -> None:
    objective = objective_of(name, budget=4)
    micros = objective.micro_batches(batch_of(name), step=1)
    total, metrics = objective(objective.absent(micros[1]))
    assert total.item() == 0 and all(count == 0 for _, count in metrics.values())
    total.backward()
    assert (objective.backend.module.logps.grad == 0).all()


@pytest.mark.parametrize("name", COUPLED)
def test_evaluation_gives_the_training_loss_of_the_same_batch(name) -> None:
    objective = objective_of(name, budget=5)
    batch = batch_of(name, WEIGHTS)
    summed = counted = 0.0
    for micro in objective.micro_batches(batch, step=0):
        total, count = objective.evaluate(micro)["loss"]
        summed, counted = summed + float(total), counted + float(count)
    expected, _ = by_hand(name, WEIGHTS, step=0)
    assert summed / counted == pytest.approx(expected, rel=1e-5)
    assert counted == float(WEIGHTS.sum())


def test_the_baseline_of_kto_has_no_gradient_and_needs_mismatched_answers() -> None:
    _, gradients = loss_and_gradients(objective_of("kto", 4), batch_of("kto"))
    assert (gradients["logps"][NUM:] == 0).all() and (gradients["logps"][:NUM] != 0).all()
    alone = replace(batch_of("kto"), mismatched=None)
    with pytest.raises(ValueError, match=r"Make its source with RowSource\(\.\.\., mismatched=T"):
        objective_of("kto").micro_batches(alone, 1)


def poisoned(name: str, budget: int, row: int) -> list[int]:
    """The rows that are named when one row's log-likelihood is not finite."""
    objective = objective_of(name, budget)
    with torch.no_grad():
        cell = row if "kl" in LOSSES[name].needs else 2 * row
        objective.backend.module.logps[cell] = torch.nan
    micros = objective.micro_batches(batch_of(name), step=1)
    return [found for micro in micros for found in objective.culprits(micro)]


@pytest.mark.parametrize("name", ["aot", "beta_dpo", "kto"])
def test_a_row_that_is_not_finite_is_named_and_not_those_that_it_spoils(name) -> None:
    assert poisoned(name, 4, 5) == [105]


def test_kto_needs_no_second_pass_and_aot_does() -> None:
    for name, passes in (("kto", 2), ("aot", 2), ("sigmoid", 1)):
        objective = objective_of(name, budget=4)
        calls = []
        objective.backend.module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        micros = objective.micro_batches(batch_of(name), step=1)
        for micro in micros:
            objective(micro)
        # KTO's other pass is over the mismatched answers.
        assert len(calls) == passes * len(micros) == passes * 4, name
        assert (micros[0].known is None) == (name != "aot")


def test_a_sum_couples_as_its_parts_do() -> None:
    table = {name: LOSSES[name] for name in ("kto", "nca", "bco")}
    for names, couples in ((("kto", "nca"), False), (("kto", "bco"), True), (("nca",), False)):
        total = weighted_sum(dict.fromkeys(names, 1.0), table)
        assert Criterion.of(total, beta=BETA).couples is couples
