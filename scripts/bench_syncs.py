#!/usr/bin/env python
"""How often does an optimizer step make the host wait for the device?

    python scripts/bench_syncs.py [--peer-python PATH]

Counted by a dispatch mode over whole steps of four micro-batches, with a full and an adapter run:
values read by the host, shapes that depend on values, copies to the host. A logged step reads once
more. With a peer, TRL's steps of four micro-batches are counted, too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench_text import command, duel, figures
from bench_text.duel import Contestant
from bench_text.figures import Bar

PAIRS, MICRO = 8, 2


def main(given: Sequence[str] | None = None) -> int:
    options = command.read(__doc__, given, peer="optional", small=True)
    options.rounds = 4
    plain = command.specification(options, "chat", PAIRS, micro=MICRO, reads=True)
    found = [
        Contestant("alignkit", "ours", "dpo", plain),
        Contestant("alignkit, LoRA", "ours", "dpo", plain | {"lora": 4}),
    ]
    if not options.no_peer:
        found.append(Contestant("TRL", "peer", "dpo", plain))
    told = duel.compete(found, options.rounds + 1, options)
    bars = []
    for name, one in told.items():
        # The first step and the last are logged.
        reads = [sum(lap["reads"].values()) for lap in one.laps[1:-1]]
        limit = 1.0 if name.startswith("alignkit") else None
        bars.append(Bar(f"reads per step, {name}", max(reads), limit, at_most=True))
        print(name, [lap["reads"] for lap in one.laps])
    return figures.report(
        "Host syncs per optimizer step of four micro-batches", told, bars, options
    )


if __name__ == "__main__":
    sys.exit(main())
