"""Contestants in turn, and what their times say.

All are started, each in a process of its own, and wait. In every round each takes one optimizer
step, on the same rows; the order turns round from one round to the next. So whatever else the
machine does meets all of them alike. A ratio is that of median times, with a bootstrap interval
over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_text import meter

SCRIPTS = Path(__file__).parents[1]
# One thread each, and freed memory kept in the heap: the first touch of a page costs more than much
# of the arithmetic, and the stock allocator gives large tensors back after every use.
ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
    ":glibc.malloc.top_pad=268435456",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}


@dataclass(frozen=True)
class Contestant:
    """Who takes part.

    Attributes:
        name: in the table.
        side: "ours" or "peer", a module of bench_text.
        question: the function in it.
        spec: what it is told.
    """

    name: str
    side: str
    question: str
    spec: Mapping[str, Any]


@dataclass
class Told:
    """What a contestant told of itself."""

    facts: dict[str, Any] = field(default_factory=dict)
    laps: list[dict[str, Any]] = field(default_factory=list)

    def timed(self, key: str, warmup: int = 1) -> list[float]:
        return [lap[key] for lap in self.laps[warmup:]]

    def median(self, key: str = "cpu") -> float:
        return statistics.median(self.timed(key))


class _Process:
    def __init__(self, who: Contestant, python: str, log: Path) -> None:
        path = os.pathsep.join(
            [str(SCRIPTS), str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")]
        )
        self.who, self.log = who, log
        self.process = subprocess.Popen(
            [python, "-m", "bench_text.meter", who.side, who.question, json.dumps(who.spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
        )

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(meter.MARK):
                return json.loads(line.removeprefix(meter.MARK))
        tail = "\n".join(self.log.read_text().splitlines()[-15:])
        raise SystemExit(f"{self.who.name} stopped before its last step:\n{tail}")

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def compete(
    contestants: Sequence[Contestant], steps: int, options: argparse.Namespace
) -> dict[str, Told]:
    """What each told of its steps, by name."""
    if options.no_peer and options.quick:
        return {who.name: _alone(who) for who in contestants}
    told = {who.name: Told() for who in contestants}
    running: list[_Process] = []
    try:
        for place, who in enumerate(contestants):
            python = options.peer_python if who.side == "peer" else sys.executable
            running.append(_Process(who, python, options.work / f"contestant-{place}.log"))
        for one in running:
            told[one.who.name].facts = one.hear()["ready"]
        for step in range(steps):
            for one in running[:: -1 if step % 2 else 1]:
                one.go()
                told[one.who.name].laps.append(one.hear())
                print(f"step {step + 1}: {one.who.name} {told[one.who.name].laps[-1]}", flush=True)
    finally:
        for one in running:
            one.end()
    return told


def _alone(who: Contestant) -> Told:
    """One contestant in this process, without an opponent and without isolation."""
    from importlib import import_module

    mine = meter.Meter(alone=True)
    try:
        getattr(import_module(f"bench_text.{who.side}"), who.question)(dict(who.spec), mine)
    finally:
        mine.close()
    return Told(mine.facts, mine.laps)
