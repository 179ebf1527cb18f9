"""Modifiers of the objective against derivations that take the model apart token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.batches import Batch
from alignkit.losses import PREFERENCE_LOSSES
from alignkit.objectives.criterion import Criterion
from alignkit.objectives.modifiers import Modifiers
from alignkit.objectives.preference import PreferenceObjective
from alignkit.options import TextOptions
from alignkit.reference import FrozenModel
from tests.builders import loss_and_gradients, move, pair_scores, text_wing, token_rows

BETA = 0.1
NUM = 6


@pytest.fixture(scope="module")
def wing() -> Any:
    wing = text_wing("llama")
    wing.policy.double()
    return wing


@pytest.fixture(scope="module")
def reference(wing) -> FrozenModel:
    """The policy as it was; the policy has moved since."""
    frozen = FrozenModel.copy_of(wing.backend.module)
    move(wing.backend.module)
    return frozen


@pytest.fixture(scope="module")
def batch(wing) -> Batch:
    rows = [row | {"weight": 1.0 + i % 2} for i, row in enumerate(token_rows(NUM))]
    examples = wing.examples(rows, TextOptions(), kind="pairs", seed=0)
    return examples.collate(range(NUM), [0] * NUM)


@dataclass(frozen=True)
class Answer:
    """One answer's tokens under one model."""

    logps: Tensor
    squares: Tensor


def taken_apart(model: Any, batch: Batch) -> list[Answer]:
    """Each answer alone, without padding, one forward each."""
    found = []
    for place, completion in enumerate(batch.content.completions):
        prompt = batch.content.prompts[batch.content.owner[place]]
        ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))
        probabilities = model(input_ids=ids[None]).logits[0].double().softmax(-1)
        predicted = probabilities[len(prompt) - 1 : -1]
        chosen = predicted[torch.arange(len(completion)), ids[len(prompt) :]]
        found.append(Answer(chosen.log(), predicted.square().sum(-1)))
    return found


def expected(
    wing: Any, reference: FrozenModel, batch: Batch, modifiers: Modifiers
) -> tuple[float, dict[str, Tensor]]:
    """Mean loss and its gradients from the definitions."""
    module = wing.backend.module
    module.zero_grad(set_to_none=True)
    policy = taken_apart(wing.policy, batch)
    with torch.no_grad():
        frozen = taken_apart(reference.module.model, batch)
    total = torch.zeros((), dtype=torch.float64)
    for pair in range(NUM):
        w, ell = 2 * pair, 2 * pair + 1
        k = min(len(policy[w].logps), len(policy[ell].logps))

        def logp(answer: Answer, k: int = k) -> Tensor:
            share = 1.0 if modifiers.ld_alpha is None else modifiers.ld_alpha
            return answer.logps[:k].sum() + share * answer.logps[k:].sum()

        margin = (logp(policy[w]) - logp(frozen[w])) - (logp(policy[ell]) - logp(frozen[ell]))
        loss = -logsigmoid(BETA * margin)
        if modifiers.wpo:
            aligned = [(policy[i].logps - policy[i].squares.log()).mean() for i in (w, ell)]
            loss = loss * sum(aligned).exp().clamp(max=1).detach()
        loss = loss - modifiers.anchor * policy[w].logps.mean()
        total = total + batch.weight[pair] * loss
    mean = total / batch.weight.sum()
    mean.backward()
    gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return mean.item(), gradients


COMBINATIONS = {
    "none": Modifiers(),
    "ld": Modifiers(ld_alpha=0.3),
    "ld 0": Modifiers(ld_alpha=0.0),
    "wpo": Modifiers(wpo=True),
    "anchor": Modifiers(anchor=0.7),
    "all": Modifiers(ld_alpha=0.5, wpo=True, anchor=0.2),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_text_modifiers_are_what_their_papers_say(name, wing, reference, batch) -> None:
    modifiers = COMBINATIONS[name]
    criterion = Criterion.of(PREFERENCE_LOSSES["sigmoid"], beta=BETA)
    objective = PreferenceObjective(
        wing.backend, reference, criterion, modifiers=modifiers, budget=4
    )
    loss, gradients = loss_and_gradients(objective, batch)
    wanted, derived = expected(wing, reference, batch, modifiers)
    assert loss == pytest.approx(wanted, rel=1e-5)
    for key, gradient in derived.items():
        assert (gradients[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, key
    plain = 0.0 if name == "none" else expected(wing, reference, batch, Modifiers())[0]
    assert name == "none" or abs(plain - wanted) > 1e-4, "a modifier that changes nothing"


def test_ld_alpha_1_is_dpo(wing, reference, batch) -> None:
    criterion = Criterion.of(PREFERENCE_LOSSES["sigmoid"], beta=BETA)
    losses = [
        loss_and_gradients(
            PreferenceObjective(wing.backend, reference, criterion, modifiers=m, budget=NUM), batch
        )[0]
        for m in (Modifiers(), Modifiers(ld_alpha=1.0))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_wpo_is_told_in_the_metrics_and_leaves_the_rewards(wing, reference, batch) -> None:
    criterion = Criterion.of(PREFERENCE_LOSSES["sigmoid"], beta=BETA)
    told = []
    for modifiers in (Modifiers(), Modifiers(wpo=True)):
        objective = PreferenceObjective(
            wing.backend, reference, criterion, modifiers=modifiers, budget=NUM
        )
        (micro,) = objective.micro_batches(batch, 1)
        told.append(objective(micro)[1])
    plain, weighed = told
    value, count = weighed.pop("wpo/weight")
    assert 0 < float(value / count) < 1 and float(count) == float(batch.weight.sum())
    assert {k: float(v[0]) for k, v in plain.items()} == {
        k: float(v[0]) for k, v in weighed.items()
    }


# --- divergences and functions of one's own --------------------------------------------------


def test_a_divergence_changes_the_loss_and_not_the_metrics(wing, reference, batch) -> None:
    """Forward KL: L(b (e^-l - e^-w)), as if f'(u) = -1/u stood for ln u."""
    found = {}
    for divergence in ("reverse_kl", "forward_kl"):
        row = PREFERENCE_LOSSES["sigmoid"]
        criterion = Criterion(row, BETA, divergence=divergence)
        objective = PreferenceObjective(wing.backend, reference, criterion, budget=NUM)
        (micro,) = objective.micro_batches(batch, 1)
        with torch.no_grad():
            scores = objective.scores(micro)
            total, metrics = objective(micro)
        found[divergence] = float(total), metrics
    w, ell = scores.chosen.double(), scores.rejected.double()
    wanted = -logsigmoid(BETA * ((-ell).exp() - (-w).exp()))
    assert found["forward_kl"][0] == pytest.approx(float((wanted * batch.weight).sum()), rel=1e-4)
    assert found["forward_kl"][0] != pytest.approx(found["reverse_kl"][0], rel=1e-3)
    value, count = found["forward_kl"][1].pop("divergence/capped")
    assert value == 0 and count == batch.weight.sum()
    assert found["forward_kl"][1].keys() == found["reverse_kl"][1].keys()
    for key, (value, _) in found["reverse_kl"][1].items():
        assert torch.equal(found["forward_kl"][1][key][0], value), key


def test_a_divergence_beyond_its_cap_is_counted() -> None:
    criterion = Criterion(PREFERENCE_LOSSES["sigmoid"], BETA, divergence="forward_kl")
    capped = criterion.capped(pair_scores([1.0, -31.0, 2.0], [0.0, 0.0, -40.0]))
    assert capped.tolist() == [False, True, True]


def test_columns_of_the_data_mean_for_a_function_of_ones_own_what_they_mean_for_dpo() -> None:
    def mine(scores: Any, *, beta: float) -> Tensor:
        return -logsigmoid(beta * scores.margin)

    scores = pair_scores(
        [3.0, -1.0, 0.5], [1.0, 2.0, -4.0], p_chosen=[1.0, 0.3, 0.5], target_margin=[0.4, 0, 2.0]
    )
    row = PREFERENCE_LOSSES["sigmoid"]
    own, table = (Criterion.of(loss, beta=0.7) for loss in (mine, row))
    torch.testing.assert_close(own(scores), table(scores), rtol=1e-9, atol=1e-9)


def test_a_function_that_reduces_is_refused() -> None:
    criterion = Criterion.of(lambda scores, *, beta: scores.margin.mean(), beta=1.0)
    with pytest.raises(ValueError, match=r"one value per example, unreduced; '<lambda>' returned"):
        criterion(pair_scores([1.0, 2.0], [0.0, 0.0]))
