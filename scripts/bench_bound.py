#!/usr/bin/env python
"""How far is a DPO step from the arithmetic that it cannot avoid?

    python scripts/bench_bound.py [--rounds 6] [--compile]

Every batch is taken twice: once timed, once to note the matrix products that run. The same products
are then timed by themselves, on operands that are not in the cache. At that rate the bound is the
time of the least arithmetic: every weight on each prompt once and on each answer, the LM head on
the answers' tokens, once for the reference and three times for the policy. Attention, norms,
losses and the optimizer are no part of the bound. With --compile the blocks are compiled
(`trainer.compile`); the products are noted without it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_text import command, duel, figures
from bench_text.duel import Contestant
from bench_text.figures import Bar
from bench_text.world import World

PAIRS, BAR = 4, 0.8


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compile", action="store_true", help="compile the model's blocks")


def main(given: Sequence[str] | None = None) -> int:
    options = command.read(__doc__, given, arguments, peer="none")
    # A compiled step is compiled twice: for the first length, and then for all others.
    warmup = 2 if options.compile else 1
    options.rounds += warmup - 1
    spec = command.specification(options, "chat", PAIRS, compile=options.compile)
    rows = [json.loads(line) for line in Path(spec["rows"]).read_text().splitlines()]
    batches = [rows[start : start + PAIRS] for start in range(0, len(rows), PAIRS)]
    twice = Path(spec["rows"]).with_name("twice.jsonl")
    lines = [json.dumps(row) for batch in batches for row in batch * 2]
    twice.write_text("\n".join(lines) + "\n")
    spec |= {"rows": str(twice), "steps": 2 * len(batches)}
    found = [Contestant("alignkit", "ours", "bound", spec)]
    told = duel.compete(found, len(batches), options)
    laps = told["alignkit"].laps
    needed = [least(batch, options.world) for batch in batches]
    shares = [
        flops / (lap["flops"] / lap["matmuls"]) / lap["cpu"]
        for flops, lap in zip(needed, laps, strict=True)
    ][warmup:]
    limit = None if options.quick else BAR
    rate = statistics.median(lap["flops"] / lap["matmuls"] / 1e9 for lap in laps)
    wasted = statistics.median(
        lap["flops"] / flops for flops, lap in zip(needed, laps, strict=True)
    )
    bars = [
        Bar("bound / step", statistics.median(shares), limit),
        Bar("GFLOP/s of the products alone", rate),
        Bar("products that ran / least", wasted),
    ]
    return figures.report("A DPO step against its arithmetic", told, bars, options)


def least(pairs: Sequence[dict[str, Any]], world: World) -> float:
    """FLOPs of the weights: 2 per weight and position forward, and 4 more backward.

    A word is a token. Each answer has a closing eos, which is predicted and feeds nothing.
    """
    answers = sum(len((row["chosen"] + row["rejected"]).split()) for row in pairs)
    prompts = sum(len(row["prompt"].split()) for row in pairs)
    block = 4 * world.hidden**2 + 3 * world.hidden * world.feed_forward
    blocks = world.layers * block * (prompts + answers)
    head = world.vocabulary * world.hidden * (answers + 2 * len(pairs))
    return float((2 + 2 + 4) * (blocks + head))


if __name__ == "__main__":
    sys.exit(main())
