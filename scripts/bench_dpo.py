#!/usr/bin/env python
"""How much CPU time does a DPO step take, against TRL's on the same pairs?

    python scripts/bench_dpo.py --peer-python PATH [--rows chat|long] [--rounds 6]
    python scripts/bench_dpo.py --peer-python PATH --against defaults

A Llama of 41 M parameters in float32, four pairs a step, one thread each. Against TRL as set up
like us (no checkpointing, limit 512), or against its defaults (checkpointing, limit 1024). TRL's LM
head is told to skip prompts and padding, as it does on a GPU; `--stock-head` leaves it as it is off
GPUs, for information. `--precomputed` lets TRL compute its reference beforehand, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench_text import command, duel, figures
from bench_text.duel import Contestant
from bench_text.figures import Bar, ratio, shown

PAIRS = 4
BARS = {
    # ours online, ours cached, positions
    ("chat", "matched"): (2.1, 2.8, 0.50),
    ("chat", "defaults"): (2.3, None, 0.50),
    ("long", "matched"): (1.7, 2.3, 0.55),
    ("long", "defaults"): (None, None, 0.55),
}
MEMORY = 0.65
CACHED = "alignkit, reference cached"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", choices=("chat", "long"), default="chat")
    parser.add_argument("--against", choices=("matched", "defaults"), default="matched")
    parser.add_argument("--stock-head", action="store_true")
    parser.add_argument("--precomputed", action="store_true")
    parser.add_argument("--packing", default="auto", help="of our side")


def contestants(options: argparse.Namespace) -> list[Contestant]:
    plain = command.specification(options, options.rows, PAIRS, packing=options.packing)
    theirs = plain | {"cached": options.precomputed}
    if options.against == "defaults":
        theirs |= {"max_length": 2 * options.world.cap, "checkpointing": True}
    if options.stock_head:
        theirs |= {"head": "stock"}
    found = [
        Contestant("alignkit", "ours", "dpo", plain),
        Contestant(CACHED, "ours", "dpo", plain | {"cached": True}),
    ]
    if options.against == "defaults":
        found.pop()
    if not options.no_peer:
        found.append(Contestant("TRL", "peer", "dpo", theirs))
    return found


def main(given: Sequence[str] | None = None) -> int:
    options = command.read(__doc__, given, arguments)
    told = duel.compete(contestants(options), options.rounds + 1, options)
    bars: list[Bar] = []
    if not options.no_peer:
        ours, cached, peer = told["alignkit"], told.get(CACHED), told["TRL"]
        claimed = not (options.stock_head or options.precomputed or options.quick)
        limits = BARS[options.rows, options.against] if claimed else (None, None, None)
        times = peer.timed("cpu")
        bars = [shown("times as fast", ratio(times, ours.timed("cpu")), limits[0])]
        if cached is not None:
            bars.append(shown("with a cache", ratio(times, cached.timed("cpu")), limits[1]))
        memory = MEMORY if claimed and options.against == "matched" else None
        bars += figures.beside(ours, peer, positions=limits[2], memory=memory)
    question = f"DPO, {options.rows} rows, TRL {options.against}"
    question += ", stock head" if options.stock_head else ""
    question += ", reference precomputed by TRL, too" if options.precomputed else ""
    return figures.report(question, told, bars, options)


if __name__ == "__main__":
    sys.exit(main())
