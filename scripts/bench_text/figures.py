"""What times say: ratios with intervals, figures with their bars, tables and JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench_text import meter
from bench_text.duel import Told


@dataclass(frozen=True)
class Ratio:
    """Of median times, and where 95 of 100 bootstrap draws of the rounds put it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}x [{self.low:.2f}, {self.high:.2f}]"


def ratio(peer: Sequence[float], ours: Sequence[float], draws: int = 10_000) -> Ratio:
    """How many times as long the peer's median step takes; a round is drawn with all its times."""
    pairs, rng = list(zip(peer, ours, strict=True)), random.Random(0)

    def of(rounds: Sequence[tuple[float, float]]) -> float:
        theirs, mine = zip(*rounds, strict=True)
        return statistics.median(theirs) / statistics.median(mine)

    found = sorted(of(rng.choices(pairs, k=len(pairs))) for _ in range(draws))
    return Ratio(of(pairs), found[draws // 40], found[-1 - draws // 40])


@dataclass(frozen=True)
class Bar:
    """A figure and what it must be; `limit` None is printed and not claimed."""

    label: str
    value: float
    limit: float | None = None
    at_most: bool = False
    shown: str = ""

    @property
    def met(self) -> bool:
        if self.limit is None:
            return True
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def __str__(self) -> str:
        if self.limit is None:
            return f"| {self.label} | {self.shown or f'{self.value:.2f}'} | not claimed |  |"
        sign, verdict = ("<=" if self.at_most else ">="), ("yes" if self.met else "**no**")
        shown = self.shown or f"{self.value:.2f}"
        return f"| {self.label} | {shown} | {sign} {self.limit:g} | {verdict} |"


def shown(label: str, found: Ratio, limit: float | None = None) -> Bar:
    return Bar(label, found.value, limit, shown=str(found))


def report(
    question: str, told: Mapping[str, Told], bars: Sequence[Bar], options: argparse.Namespace
) -> int:
    """Print the tables, write the JSON; 1 if a bar is missed."""
    print(f"\n{question}\n")
    if told:
        print("| contestant | CPU s per step | positions | peak MiB above imports |")
        print("|---|---|---|---|")
    for name, one in told.items():
        print(
            f"| {name} | {one.median():.2f} ({min(one.timed('cpu')):.2f} to "
            f"{max(one.timed('cpu')):.2f}) | {one.median('positions'):.0f} | "
            f"{one.laps[-1]['mib']:.0f} |"
        )
    print("\n| figure | measured | bar | met |\n|---|---|---|---|")
    print("\n".join(map(str, bars)))
    made = {
        "question": question,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": meter.versions("torch", "transformers"),
        "contestants": {name: {"facts": o.facts, "laps": o.laps} for name, o in told.items()},
        "bars": [
            {"label": b.label, "value": b.value, "shown": b.shown, "bar": b.limit, "met": b.met}
            for b in bars
        ],
    }
    name = Path(sys.argv[0]).stem if options.name is None else options.name
    path = options.work / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made, indent=1) + "\n")
    print(f"\n{path}")
    return 0 if all(b.met for b in bars) else 1


def beside(
    mine: Told,
    theirs: Told,
    *,
    positions: float | None = None,
    memory: float | None = None,
    same_losses: bool = True,
) -> list[Bar]:
    """What goes with every comparison: positions, peak memory, and how far apart losses are."""
    computed = sum(mine.timed("positions")) / sum(theirs.timed("positions"))
    found = [
        Bar("positions", computed, positions, at_most=True),
    ]
    mib, their_mib = mine.laps[-1]["mib"], theirs.laps[-1]["mib"]
    if their_mib:  # a tiny model's run fits into what the imports left
        found.append(Bar("peak memory", mib / their_mib, memory, at_most=True))
    if same_losses:
        apart = largest_difference(mine, theirs)
        found.append(Bar("losses apart", apart, 1e-4, at_most=True, shown=f"{apart:.1e}"))
    return found


def largest_difference(ours: Told, peer: Told, steps: int = 5) -> float:
    """Of the losses of the first steps, the warm-up among them."""
    pairs = zip(ours.laps[:steps], peer.laps[:steps], strict=True)
    return max(abs(mine["loss"] - theirs["loss"]) for mine, theirs in pairs)
