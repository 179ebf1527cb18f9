#!/usr/bin/env python
"""What does the library's own work add to a step, over a bare loop around the same module?

    python scripts/bench_overhead.py [--rows chat|long] [--rounds 6]

`bench_text/bare.py` is that loop, written by hand. Batching, splitting, metrics, checks of finite
numbers and whatever else the Trainer does must cost at most 5 % of a step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench_text import command, duel, figures
from bench_text.duel import Contestant
from bench_text.figures import Bar

PAIRS, BAR = 4, 1.05


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", choices=("chat", "long"), default="chat")


def main(given: Sequence[str] | None = None) -> int:
    options = command.read(__doc__, given, arguments, peer="none")
    spec = command.specification(options, options.rows, PAIRS)
    found = [Contestant("alignkit", "ours", "dpo", spec), Contestant("bare", "bare", "dpo", spec)]
    told = duel.compete(found, options.rounds + 1, options)
    ours, bare = told["alignkit"], told["bare"]
    cost = figures.ratio(ours.timed("cpu"), bare.timed("cpu"))
    limit = None if options.quick else BAR
    bars = [Bar("step / bare step", cost.value, limit, at_most=True, shown=str(cost))]
    bars += figures.beside(ours, bare)
    return figures.report(f"DPO, {options.rows} rows, against a bare loop", told, bars, options)


if __name__ == "__main__":
    sys.exit(main())
