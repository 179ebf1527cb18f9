"""Whole-policy optima through `align()`: a tabular language model on the exact preferences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_expit
from transformers import AutoModelForCausalLM

from alignkit import (
    DPO,
    AlignResult,
    GenerationOptions,
    SyncedReference,
    TextOptions,
    TrainerOptions,
    align,
)
from tests.ledger import Ledger
from tests.proofs.optima import (
    Formula,
    Optimum,
    Vector,
    beats,
    minimised,
    per_token,
    tilted,
    wins,
)
from tests.proofs.tabular import TabularLM, probabilities_of, tabular_lm

ANSWERS = ["ash", "birch", "red cedar", "red oak"]
WORLD = {
    "north ": (np.array([0.1, 0.4, 0.3, 0.2]), np.array([1.0, 0, -1, 0.5])),
    "south ": (np.array([0.25, 0.15, 0.2, 0.4]), np.array([-0.5, 1.2, 0.3, 0])),
}
"""Prompt -> reference probabilities and rewards of the answers."""


TOKENS = np.array([2, 2, 3, 3])
"""Of each answer, its closing eos among them."""
B, TOLERANCE = 0.5, 1e-3


def L(x: Any) -> Any:
    return -log_expit(x)


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        name: of the method.
        claim: what the optimum is.
        method: trained by `align()`.
        optimum: its closed form.
        loss: the formula once more, for the search that the closed form is checked by.
        flipped: share of the labels that are wrong.
        reference: False where log-likelihoods stand for log-ratios.
    """

    name: str
    claim: str
    method: DPO
    optimum: Optimum
    loss: Formula
    flipped: float = 0.0
    reference: bool = True


KL_OPTIMUM = "mu exp(r / beta), the optimum of E[r] - beta KL"
CASES = [
    Case(
        "sigmoid",
        KL_OPTIMUM,
        DPO(beta=B),
        lambda mu, r: tilted(mu, r / B),
        lambda w, ell: L(B * (w - ell)),
    ),
    Case(
        "robust",
        f"{KL_OPTIMUM}, though a tenth of the labels is wrong",
        DPO(loss="robust", beta=B, label_smoothing=0.1),
        lambda mu, r: tilted(mu, r / B),
        lambda w, ell: (0.9 * L(B * (w - ell)) - 0.1 * L(B * (ell - w))) / 0.8,
        flipped=0.1,
    ),
    Case(
        "ipo, sums",
        "mu exp(P(y beats mu) / beta)",
        DPO(loss="ipo", beta=B, average=False),
        lambda mu, r: tilted(mu, wins(mu, r) / B),
        lambda w, ell: (w - ell - 1 / (2 * B)) ** 2,
    ),
    Case(
        "ipo, averages",
        "mu exp(|y| (P(y beats mu) / beta + c))",
        DPO(loss="ipo", beta=1.0),
        lambda mu, r: per_token(mu, TOKENS, wins(mu, r)),
        lambda w, ell: (per_answer(w, 0) - per_answer(ell, 1) - 1 / 2) ** 2,
    ),
    Case(
        "nca_pair",
        "2 mu P(y beats mu), at beta = 1",
        DPO(loss="nca_pair", beta=1.0),
        lambda mu, r: 2 * mu * wins(mu, r),
        lambda w, ell: L(w) + L(-w) / 2 + L(-ell) / 2,
    ),
    Case(
        "rdpo",
        "mu exp((r - c |y|) / beta): the reward is charged for length",
        DPO(loss="rdpo", beta=B, length_coef=0.4),
        lambda mu, r: tilted(mu, (r - 0.4 * TOKENS) / B),
        lambda w, ell: L(B * (w - ell) + 0.4 * (TOKENS[:, None] - TOKENS)),
    ),
    Case(
        "sigmoid_norm",
        "mu exp(|y| (r / beta + c))",
        DPO(loss="sigmoid_norm", beta=2.0),
        lambda mu, r: per_token(mu, TOKENS, r / 2),
        lambda w, ell: L(2 * (per_answer(w, 0) - per_answer(ell, 1))),
    ),
    Case(
        "cpo",
        "exp(r / beta), without its likelihood term",
        DPO(loss="cpo", beta=B, cpo_alpha=0.0),
        lambda mu, r: tilted(np.ones(4), r / B),
        lambda w, ell: L(B * (w - ell)),
        reference=False,
    ),
    Case(
        "simpo",
        "exp(|y| (r / beta + c)), without its margin",
        DPO(loss="simpo", beta=2.0, gamma_ratio=0.0),
        lambda mu, r: per_token(np.ones(4), TOKENS, r / 2),
        lambda w, ell: L(2 * (per_answer(w, 0) - per_answer(ell, 1))),
        reference=False,
    ),
]


def per_answer(log_ratio: Vector, axis: int) -> Vector:
    """A matrix over (chosen, rejected) divided by the tokens of the answer along `axis`."""
    return log_ratio / (TOKENS[:, None] if axis == 0 else TOKENS)


def by_probability(flipped: float = 0.0) -> list[dict[str, Any]]:
    """Every ordered pair once, with the probability that its label says the first is better."""
    return [
        {
            "prompt": prompt,
            "chosen": ANSWERS[i],
            "rejected": ANSWERS[j],
            "weight": mu[i] * mu[j],
            "p_chosen": flipped + (1 - 2 * flipped) * beats(r)[i, j],
        }
        for prompt, (mu, r) in WORLD.items()
        for i, j in product(range(len(ANSWERS)), repeat=2)
    ]


def by_weight() -> list[dict[str, Any]]:
    """The same preferences as hard labels: each order as heavy as it is likely."""
    return [
        {key: value for key, value in row.items() if key != "p_chosen"}
        | {"weight": row["weight"] * row["p_chosen"]}
        for row in by_probability()
    ]


def policy() -> tuple[TabularLM, Any]:
    prompts = [prompt.strip() for prompt in WORLD]
    return tabular_lm(prompts, ANSWERS, [mu.tolist() for mu, _ in WORLD.values()])


def train(
    policy: Any,
    method: DPO,
    rows: list[dict[str, Any]],
    *,
    steps: int = 250,
    schedule: Any = "linear",
    **more: Any,
) -> AlignResult:
    """Whole batches, so that nothing is left to chance."""
    trainer = TrainerOptions(
        max_steps=steps,
        batch_size=len(rows),
        learning_rate=0.1,
        schedule=schedule,
        warmup=0,
        precision="fp32",
        log_every=steps,
    )
    keep = TextOptions(identical_pairs="keep")
    return align(policy, method, rows, data_options=keep, trainer=trainer, **more)


def check_optimum(ledger: Ledger, case: Case, found: TabularLM) -> None:
    probabilities = probabilities_of(found)
    for got, (prompt, world) in zip(probabilities, WORLD.items(), strict=True):
        ledger.check(
            case.name,
            f"{case.claim}, after {prompt.strip()!r}",
            got=got,
            expected=case.optimum(*world),
            tolerance=TOLERANCE,
            measure="total variation",
        )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_closed_form_is_the_minimum_of_the_formula(case: Case) -> None:
    for world in WORLD.values():
        searched = minimised(case.loss, *world, flipped=case.flipped, reference=case.reference)
        assert abs(searched - case.optimum(*world)).sum() / 2 < 1e-5
        assert abs(searched - world[0]).sum() / 2 > 0.05, "not where it starts"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_align_reaches_the_optimum(case: Case, ledger: Ledger) -> None:
    check_optimum(ledger, case, train(policy(), case.method, by_probability(case.flipped)).model)


def test_hard_labels_of_both_orders_are_the_same_preferences(ledger: Ledger) -> None:
    case = replace(CASES[0], name="dpo, hard labels")
    check_optimum(ledger, case, train(policy(), case.method, by_weight()).model)


@pytest.mark.slow
def test_rounds_of_a_synced_reference_add_up(ledger: Ledger) -> None:
    """Each round ends at the reference of the next, times exp(r / beta) once more."""
    rounds, every, beta = 2, 200, 1.0
    case = replace(
        CASES[0],
        name="sigmoid, TR-DPO",
        claim=f"mu exp({rounds} r / beta) after {rounds} hard syncs",
        method=DPO(beta=beta),
        optimum=lambda mu, r: tilted(mu, rounds * r / beta),
    )
    found = train(
        policy(),
        case.method,
        by_probability(),
        steps=rounds * every,
        schedule="constant",
        reference=SyncedReference(every=every),
    )
    check_optimum(ledger, case, found.model)


@pytest.mark.slow
def test_from_a_folder_into_a_folder(ledger: Ledger, tmp_path: Path) -> None:
    model, tokenizer = policy()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    result = train(
        str(tmp_path / "base"),
        CASES[0].method,
        by_probability(),
        run_dir=tmp_path / "run",
        generation=GenerationOptions(max_new_tokens=4),
    )
    assert set(result.sample(list(WORLD) * 8)) <= set(ANSWERS)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    check_optimum(ledger, replace(CASES[0], name="dpo, folders"), saved)
