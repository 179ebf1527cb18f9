"""The proof ledger: what the library claims, what was expected, what came out.

A proof is a test that takes the `ledger` fixture and states its result with `ledger.check`, which
notes the claim and asserts it. So every proof is a test, and `./scripts/proofs` is the same tests
with their claims written down.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Numbers = tuple[float, ...]


def _absolute(got: Numbers, expected: Numbers) -> float:
    return max(abs(g - e) for g, e in zip(got, expected, strict=True))


def _relative(got: Numbers, expected: Numbers) -> float:
    return max(abs(g / e - 1) for g, e in zip(got, expected, strict=True))


def _total_variation(got: Numbers, expected: Numbers) -> float:
    return sum(abs(g - e) for g, e in zip(got, expected, strict=True)) / 2


MEASURES: dict[str, Callable[[Numbers, Numbers], float]] = {
    "absolute": _absolute,
    "relative": _relative,
    "total variation": _total_variation,
}
"""How far `got` is from `expected`."""


@dataclass(frozen=True)
class Claim:
    """One line of the ledger.

    Attributes:
        method: what is proven, by the name that users write.
        claim: the statement, in words.
        expected: from a closed form, root finding or a minimisation in float64; never from the
            code under test.
        got: what the library came to.
        tolerance: of `MEASURES[measure]`.
        measure: a key of `MEASURES`.
    """

    method: str
    claim: str
    expected: Numbers
    got: Numbers
    tolerance: float
    measure: str

    def __post_init__(self) -> None:
        if not self.got or len(self.got) != len(self.expected):
            raise ValueError(
                f"A claim compares as many numbers as it expects, at least one; {self.claim!r} got "
                f"{len(self.got)} and expects {len(self.expected)}."
            )

    @property
    def off_by(self) -> float:
        return MEASURES[self.measure](self.got, self.expected)

    @property
    def holds(self) -> bool:
        # A NaN is below no tolerance.
        return self.off_by <= self.tolerance

    @property
    def verdict(self) -> str:
        return "holds" if self.holds else "FAILS"


class Ledger:
    """The claims of a test run, and the proofs that broke before they could state one."""

    def __init__(self) -> None:
        self.claims: list[Claim] = []
        self.broken: list[str] = []

    def check(
        self,
        method: str,
        claim: str,
        *,
        got: float | Sequence[float],
        expected: float | Sequence[float],
        tolerance: float,
        measure: str = "absolute",
    ) -> None:
        """Note a claim, and fail unless it holds."""
        made = Claim(method, claim, _numbers(expected), _numbers(got), tolerance, measure)
        self.claims.append(made)
        assert made.holds, (
            f"{method}: {claim}: expected {_shown(made.expected)}, got {_shown(made.got)}; "
            f"{measure} {made.off_by:.2g} above {tolerance:g}"
        )

    @property
    def failed(self) -> int:
        return sum(not claim.holds for claim in self.claims)

    @property
    def holds(self) -> bool:
        return bool(self.claims) and not self.broken and not self.failed

    def rows(self) -> list[tuple[str, ...]]:
        """The table: a head and one row per claim, as text."""
        head = ("method", "claim", "expected", "got", "off by", "tolerance", "verdict")
        lines = [
            (
                c.method,
                c.claim,
                _shown(c.expected),
                _shown(c.got),
                f"{c.off_by:.1e}",
                f"{c.tolerance:g} {c.measure}",
                c.verdict,
            )
            for c in self.claims
        ]
        lines += [(name, "broke before its claim", "", "", "", "", "FAILS") for name in self.broken]
        return [head, *lines]

    def summary(self) -> str:
        held = len(self.claims) - self.failed
        broken = f", {len(self.broken)} proofs broke" if self.broken else ""
        return f"{held} of {len(self.claims)} claims hold{broken}."

    def table(self) -> str:
        """The table in columns, for a terminal."""
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, "", self.summary()])

    def write(self, folder: Path) -> None:
        """`ledger.md` for people and `ledger.json` for programs."""
        folder.mkdir(parents=True, exist_ok=True)
        head, *rows = self.rows()
        lines = [head, tuple("---" for _ in head), *rows]
        table = "\n".join(
            "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
        )
        page = f"# Proof ledger\n\n{self.summary()}\n\n{table}\n"
        (folder / "ledger.md").write_text(page, encoding="utf-8")
        claims = [vars(c) | {"off_by": c.off_by, "verdict": c.verdict} for c in self.claims]
        told = {"holds": self.holds, "claims": claims, "broken": self.broken}
        (folder / "ledger.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _numbers(value: Any) -> Numbers:
    """A number, a sequence, an array or a tensor as floats."""
    listed = value.tolist() if hasattr(value, "tolist") else value
    return tuple(float(v) for v in (listed if isinstance(listed, Sequence) else [listed]))


def _shown(values: Numbers) -> str:
    digits = [f"{v:.6g}" if math.isfinite(v) else str(v) for v in values]
    return digits[0] if len(digits) == 1 else " ".join(f"{v:.4f}" for v in values)
