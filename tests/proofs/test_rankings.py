"""Whole-policy optima of losses of rankings and of single answers, through `align()`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from alignkit import DPO, KTO
from alignkit.losses import GROUP_LOSSES
from tests.ledger import Ledger
from tests.proofs.optima import Optimum, tilted, wins
from tests.proofs.world import Rows, check_optimum, policy, rankings, singles, train

CASES: list[tuple[str, str, Any, Callable[[], Rows], Optimum]] = [
    *(
        (
            name,
            "mu exp(r / beta), from all rankings of four",
            DPO(loss=name, beta=0.5),
            rankings,
            lambda mu, r: tilted(mu, r / 0.5),
        )
        for name in GROUP_LOSSES
    ),
    (
        "nca",
        "2 mu P(y beats mu), from likes as frequent as wins, at beta = 1",
        KTO(loss="nca", beta=1.0),
        singles,
        lambda mu, r: 2 * mu * wins(mu, r),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "claim", "method", "rows", "optimum"), CASES, ids=[case[0] for case in CASES]
)
def test_align_reaches_the_optimum(
    name: str,
    claim: str,
    method: Any,
    rows: Callable[[], Rows],
    optimum: Optimum,
    ledger: Ledger,
) -> None:
    check_optimum(ledger, name, claim, optimum, train(policy(), method, rows()).model)
