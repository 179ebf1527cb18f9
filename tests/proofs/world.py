"""Two prompts with four answers each, whose preferences are known exactly, and a tabular language
model to train on them."""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import numpy as np

from alignkit import AlignResult, TextOptions, TrainerOptions, align
from tests.ledger import Ledger
from tests.proofs.optima import Optimum, beats, plackett_luce, wins
from tests.proofs.tabular import TabularLM, probabilities_of, tabular_lm

ANSWERS = ["ash", "birch", "red cedar", "red oak"]
TOKENS = np.array([2, 2, 3, 3])
"""Of each answer, its closing eos among them."""
WORLD = {
    "north ": (np.array([0.1, 0.4, 0.3, 0.2]), np.array([1.0, 0, -1, 0.5])),
    "south ": (np.array([0.25, 0.15, 0.2, 0.4]), np.array([-0.5, 1.2, 0.3, 0])),
}
"""Prompt -> reference probabilities and rewards of the answers."""
TOLERANCE = 1e-3

Rows = list[dict[str, Any]]


def pairs(flipped: float = 0.0) -> Rows:
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
        for i, j in product(range(4), repeat=2)
    ]


def hard_pairs() -> Rows:
    """The same preferences as hard labels: each order as heavy as it is likely."""
    return [
        {key: value for key, value in row.items() if key != "p_chosen"}
        | {"weight": row["weight"] * row["p_chosen"]}
        for row in pairs()
    ]


def rankings() -> Rows:
    """All orders of the four answers, as likely as Plackett and Luce have them."""
    return [
        {
            "prompt": prompt,
            "responses": ANSWERS,
            "ranking": [order.index(i) for i in range(4)],
            "weight": plackett_luce(r, order),
        }
        for prompt, (_, r) in WORLD.items()
        for order in permutations(range(4))
    ]


def singles() -> Rows:
    """Every answer, liked as often as it beats one of the reference's."""
    return [
        {"prompt": prompt, "completion": answer, "label": liked, "weight": share}
        for prompt, (mu, r) in WORLD.items()
        for i, answer in enumerate(ANSWERS)
        for liked, share in (
            (True, mu[i] * wins(mu, r)[i]),
            (False, mu[i] * (1 - wins(mu, r)[i])),
        )
    ]


def policy() -> tuple[TabularLM, Any]:
    """At the reference."""
    prompts = [prompt.strip() for prompt in WORLD]
    return tabular_lm(prompts, ANSWERS, [mu.tolist() for mu, _ in WORLD.values()])


def train(
    policy: Any,
    method: Any,
    rows: Rows,
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


def check_optimum(
    ledger: Ledger, name: str, claim: str, optimum: Optimum, found: TabularLM
) -> None:
    """The policy after each prompt, in total variation."""
    for got, (prompt, world) in zip(probabilities_of(found), WORLD.items(), strict=True):
        ledger.check(
            name,
            f"{claim}, after {prompt.strip()!r}",
            got=got,
            expected=optimum(*world),
            tolerance=TOLERANCE,
            measure="total variation",
        )
