"""The proof ledger tells what holds from what does not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ledger import Ledger


def test_a_claim_is_noted_whether_it_holds_or_not(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.check("dpo", "a | b", got=torch.tensor(2.01), expected=2.0, tolerance=0.02)
    wrong = [
        {"got": 2.03, "expected": 2.0, "tolerance": 0.02},
        {"got": 2.03, "expected": 2.0, "tolerance": 0.01, "measure": "relative"},
        {
            "got": [0.4, 0.6],
            "expected": [0.5, 0.5],
            "tolerance": 0.09,
            "measure": "total variation",
        },
        {"got": float("nan"), "expected": 2.0, "tolerance": 0.02},
    ]
    for given in wrong:
        with pytest.raises(AssertionError, match="ipo: it fails: expected"):
            ledger.check("ipo", "it fails", **given)
    assert ledger.summary() == "1 of 5 claims hold." and not ledger.holds
    ledger.write(tmp_path)
    told = json.loads((tmp_path / "ledger.json").read_text())
    assert [claim["verdict"] for claim in told["claims"]] == ["holds", *["FAILS"] * 4]
    lines = (tmp_path / "ledger.md").read_text().splitlines()
    assert sum(line.startswith("| ipo |") and line.endswith("FAILS |") for line in lines) == 4
    assert "| dpo | a \\| b | 2 | 2.01 |" in "\n".join(lines)


@pytest.mark.parametrize(("got", "expected"), [(3, 2), (1, 2), (0, 0)])
def test_other_numbers_than_expected_are_refused(got: int, expected: int) -> None:
    ledger = Ledger()
    with pytest.raises(ValueError, match="as many numbers as it expects"):
        ledger.check("dpo", "x", got=np.ones(got), expected=np.ones(expected), tolerance=1.0)
    assert not ledger.claims


def test_what_breaks_or_is_absent_proves_nothing() -> None:
    ledger = Ledger()
    assert not ledger.holds
    ledger.check("dpo", "x", got=1.0, expected=1.0, tolerance=0.0)
    assert ledger.holds
    ledger.broken.append("test_another")
    assert not ledger.holds and ledger.table().count("FAILS") == 1
