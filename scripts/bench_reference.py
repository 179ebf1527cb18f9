#!/usr/bin/env python
"""How many rows a second does the pass of a cached reference take, against TRL's precomputation?

    python scripts/bench_reference.py --peer-python PATH [--rounds 6]

From rows of text to numbers on disk, model in memory: tokenisation, the hash of the weights and the
forwards, 32 pairs a round. A second run over the same rows must evaluate no reference.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench_text import command, duel, figures
from bench_text.duel import Contestant
from bench_text.figures import Bar

PAIRS, BAR = 32, 2.0


def main(given: Sequence[str] | None = None) -> int:
    options = command.read(__doc__, given)
    pairs = 4 if options.quick else PAIRS
    spec = command.specification(options, "chat", pairs)
    found = [Contestant("alignkit", "ours", "reference", spec)]
    if not options.no_peer:
        found.append(Contestant("TRL", "peer", "reference", spec))
    told = duel.compete(found, options.rounds + 1, options)
    ours = told["alignkit"]
    again = max(lap["again"] + lap["computed"] for lap in ours.laps)
    bars = [Bar("reference forwards of a second run", again, 0.0, at_most=True)]
    if not options.no_peer:
        faster = figures.ratio(told["TRL"].timed("cpu"), ours.timed("cpu"))
        bars.insert(0, figures.shown("times as fast", faster, None if options.quick else BAR))
    for name, one in told.items():
        bars.append(Bar(f"rows per second, {name}", pairs / one.median()))
    return figures.report("The pass of the reference", told, bars, options)


if __name__ == "__main__":
    sys.exit(main())
