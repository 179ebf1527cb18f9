"""Whole-policy optima of pairwise losses through `align()`, on the exact preferences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_expit
from transformers import AutoModelForCausalLM

from alignkit import DPO, GenerationOptions, SyncedReference
from tests.ledger import Ledger
from tests.proofs.optima import (
    Formula,
    Optimum,
    Vector,
    minimised,
    of_divergence,
    per_token,
    tilted,
    wins,
)
from tests.proofs.world import (
    ANSWERS,
    TOKENS,
    WORLD,
    check_optimum,
    hard_pairs,
    pairs,
    policy,
    train,
)

B = 0.5


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

    def search(self, mu: Vector, r: Vector) -> Vector:
        """The minimum of the formula's expectation."""
        return minimised(self.loss, mu, r, flipped=self.flipped, reference=self.reference)


def kl_optimum(mu: Vector, r: Vector) -> Vector:
    return tilted(mu, r / B)


KL_OPTIMUM = "mu exp(r / beta), the optimum of E[r] - beta KL"
CASES = [
    Case(
        "sigmoid",
        KL_OPTIMUM,
        DPO(beta=B),
        kl_optimum,
        lambda w, ell: L(B * (w - ell)),
    ),
    Case(
        "robust",
        f"{KL_OPTIMUM}, though a tenth of the labels is wrong",
        DPO(loss="robust", beta=B, label_smoothing=0.1),
        kl_optimum,
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
    Case(
        "sigmoid, forward KL",
        "mu beta / (c - r), the optimum of E[r] - beta KL(mu | policy)",
        DPO(beta=B, divergence="forward_kl"),
        of_divergence(lambda x: -1 / x, 0.0, B),
        lambda w, ell: L(B * (np.exp(-ell) - np.exp(-w))),
    ),
    Case(
        "sigmoid, Jensen-Shannon",
        "mu v / (1 - v), v = exp((r - c) / beta) / 2",
        DPO(beta=B, divergence="js_divergence"),
        of_divergence(lambda x: np.exp(x) / (2 - np.exp(x)), np.log(2), B),
        lambda w, ell: L(B * (L(ell) - L(w))),
    ),
    Case(
        "sigmoid, alpha 0.4",
        "mu (1 - 0.4 (r - c) / beta)^(-1 / 0.4)",
        DPO(beta=B, divergence="alpha", divergence_alpha=0.4),
        of_divergence(lambda x: (1 - 0.4 * x) ** (-1 / 0.4), 1 / 0.4, B),
        lambda w, ell: L(B * (np.exp(-0.4 * ell) - np.exp(-0.4 * w)) / 0.4),
    ),
]


def per_answer(log_ratio: Vector, axis: int) -> Vector:
    """A matrix over (chosen, rejected) divided by the tokens of the answer along `axis`."""
    return log_ratio / (TOKENS[:, None] if axis == 0 else TOKENS)


SEARCHED: list[tuple[str, DPO, Callable[[Vector], Formula]]] = [
    ("bco_pair", DPO(loss="bco_pair", beta=B), lambda mu: lambda w, ell: L(B * w) + L(-B * ell)),
    (
        "sppo_hard",
        DPO(loss="sppo_hard", beta=B),
        lambda mu: lambda w, ell: (w - 1) ** 2 + (ell + 1) ** 2,
    ),
    (
        "cal_dpo",
        DPO(loss="cal_dpo", beta=B),
        lambda mu: lambda w, ell: L(w - ell) + (w - 1) ** 2 + (ell + 1) ** 2,
    ),
    (
        "0.8 sigmoid + 0.2 bco_pair",
        DPO(loss={"sigmoid": 0.8, "bco_pair": 0.2}, beta=B),
        lambda mu: lambda w, ell: 0.8 * L(B * (w - ell)) + 0.2 * (L(B * w) + L(-B * ell)),
    ),
    (
        "sigmoid, anchor 0.3",
        DPO(beta=B, anchor=0.3),
        lambda mu: lambda w, ell: L(B * (w - ell)) - 0.3 * per_answer(w + np.log(mu)[:, None], 0),
    ),
]
"""Method -> the formula of its loss, given the reference: optima without a closed form."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_closed_form_is_the_minimum_of_the_formula(case: Case) -> None:
    for world in WORLD.values():
        searched = case.search(*world)
        assert abs(searched - case.optimum(*world)).sum() / 2 < 1e-5
        assert abs(searched - world[0]).sum() / 2 > 0.05, "not where it starts"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_align_reaches_the_optimum(case: Case, ledger: Ledger) -> None:
    found = train(policy(), case.method, pairs(case.flipped)).model
    check_optimum(ledger, case.name, case.claim, case.optimum, found)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method", "formula"), SEARCHED, ids=[s[0] for s in SEARCHED])
def test_align_reaches_the_minimum(
    name: str, method: DPO, formula: Callable[[Vector], Formula], ledger: Ledger
) -> None:
    found = train(policy(), method, pairs()).model
    claim = "minimum of the expected loss"
    check_optimum(ledger, name, claim, lambda mu, r: minimised(formula(mu), mu, r), found)


def test_hard_labels_of_both_orders_are_the_same_preferences(ledger: Ledger) -> None:
    found = train(policy(), DPO(beta=B), hard_pairs()).model
    check_optimum(ledger, "sigmoid, hard labels", KL_OPTIMUM, kl_optimum, found)


@pytest.mark.slow
def test_rounds_of_a_synced_reference_add_up(ledger: Ledger) -> None:
    """Each round ends at the reference of the next, times exp(r / beta) once more."""
    found = train(
        policy(),
        DPO(beta=1.5),
        pairs(),
        steps=600,
        schedule="constant",
        reference=SyncedReference(every=200),
    ).model
    claim = "mu exp(3 r / beta) after 3 hard syncs"
    check_optimum(ledger, "sigmoid, TR-DPO", claim, lambda mu, r: tilted(mu, 3 * r / 1.5), found)


@pytest.mark.slow
def test_from_a_folder_into_a_folder(ledger: Ledger, tmp_path: Path) -> None:
    model, tokenizer = policy()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    result = train(
        str(tmp_path / "base"),
        DPO(beta=B),
        pairs(),
        run_dir=tmp_path / "run",
        generation=GenerationOptions(max_new_tokens=4),
    )
    assert set(result.sample(list(WORLD) * 8)) <= set(ANSWERS)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    check_optimum(ledger, "sigmoid, folders", KL_OPTIMUM, kl_optimum, saved)
