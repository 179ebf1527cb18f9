#!/usr/bin/env python
"""What does computing each prompt once, without padding, save of our own step?

    python scripts/bench_packing.py [--rows chat|long] [--rounds 6]

The same DPO steps with packing="prefix" and with packing="none", which pads every row of a batch
to its longest. Set up as bench_dpo.py, without a peer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench_text import command, duel, figures
from bench_text.duel import Contestant

PAIRS, BAR = 4, 1.6
LAYOUTS = ("prefix", "none")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", choices=("chat", "long"), default="chat")


def main(given: Sequence[str] | None = None) -> int:
    options = command.read(__doc__, given, arguments, peer="none")
    plain = command.specification(options, options.rows, PAIRS)
    found = [Contestant(name, "ours", "dpo", plain | {"packing": name}) for name in LAYOUTS]
    told = duel.compete(found, options.rounds + 1, options)
    prefix, none = (told[name] for name in LAYOUTS)
    faster = figures.ratio(none.timed("cpu"), prefix.timed("cpu"))
    limit = None if options.quick else BAR
    bars = [figures.shown("times as fast", faster, limit), *figures.beside(prefix, none)]
    return figures.report(f"DPO, {options.rows} rows, prefix against none", told, bars, options)


if __name__ == "__main__":
    sys.exit(main())
