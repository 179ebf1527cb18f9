"""Best-of-n through `align()`: the distribution of the best of four draws, and its exact KL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from alignkit import GenerationOptions, RejectionSampling, TrainerOptions, align
from tests.ledger import Ledger
from tests.proofs.tabular import probabilities_of, tabular_lm

ARMS = ["ash", "birch", "red cedar", "red oak"]
SCORES = {"uneven": [1.0, 0.0, -1.0, -2.0], "even": [0.0, 1.0, 2.0, 3.0]}
MU = {"uneven": np.array([0.2, 0.5, 0.3, 1e-7]), "even": np.full(4, 0.25)}
"""The three arms of the closed forms (the fourth never comes), and four that are equally likely."""
N = 4
DRAWS = 2000


def best_of(mu: np.ndarray, scores: Sequence[float]) -> np.ndarray:
    """F(y)^n - F(y-)^n, F the mass at or below a score."""
    order = np.argsort(scores)
    below = np.cumsum(mu[order])
    found = np.empty_like(mu)
    found[order] = below**N - (below - mu[order]) ** N
    return found / found.sum()


def kl(p: Any, q: np.ndarray) -> float:
    p = np.asarray(p)
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


def scored(prompts: Sequence[str], responses: Sequence[str], rows: Any = None) -> list[float]:
    pairs = zip(prompts, responses, strict=True)
    return [SCORES[prompt.strip()][ARMS.index(answer)] for prompt, answer in pairs]


@pytest.mark.slow
def test_fine_tuning_on_the_best_of_four_reaches_its_distribution(ledger: Ledger) -> None:
    assert best_of(MU["uneven"], SCORES["uneven"])[:3] == pytest.approx(
        [0.5904, 0.4015, 0.0081], abs=1e-4
    )
    assert kl(best_of(MU["even"], SCORES["even"]), MU["even"]) == pytest.approx(0.5903102)
    prompts = [{"prompt": f"{name} "} for name in MU for _ in range(DRAWS)]
    found = align(
        tabular_lm(list(MU), ARMS, [mu.tolist() for mu in MU.values()]),
        RejectionSampling(samples_per_prompt=N),
        prompts,
        reward=scored,
        generation=GenerationOptions(max_new_tokens=4),
        trainer=TrainerOptions(
            max_steps=60, batch_size=len(prompts), learning_rate=0.3, warmup=0, precision="fp32"
        ),
    )
    for got, (name, mu) in zip(probabilities_of(found.model), MU.items(), strict=True):
        expected = best_of(mu, SCORES[name])
        what = f"after {name!r}"
        claim = f"F(y)^4 - F(y-)^4 of {DRAWS} prompts, {what}"
        ledger.check(
            "best-of-4",
            claim,
            got=got,
            expected=expected,
            tolerance=0.02,
            measure="total variation",
        )
        ledger.check(
            "best-of-4",
            f"its exact KL, {what}",
            got=kl(got, mu),
            expected=kl(expected, mu),
            tolerance=0.05,
        )
