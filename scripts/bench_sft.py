#!/usr/bin/env python
"""How much CPU time does an SFT token take, against TRL with padding and with packing?

    python scripts/bench_sft.py --peer-python PATH [--rounds 6]

Eight prompts with answers a step; the loss is on the answers. TRL with packing fills rows of 512
tokens best-fit, four a step, so that its steps hold other rows: time is per token of the data.
Set up as bench_dpo.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench_text import command, duel, figures
from bench_text.duel import Contestant, Told
from bench_text.figures import Bar, ratio

ROWS, BINS = 8, 4


def main(given: Sequence[str] | None = None) -> int:
    options = command.read(__doc__, given)
    spec = command.specification(options, "instructions", ROWS)
    found = [Contestant("alignkit", "ours", "sft", spec)]
    if not options.no_peer:
        found.append(Contestant("TRL", "peer", "sft", spec))
        everything = str(options.folder / "instructions.jsonl")
        packed = spec | {"packed": True, "batch": BINS, "rows": everything}
        found.append(Contestant("TRL, packed", "peer", "sft", packed))
    told = duel.compete(found, options.rounds + 1, options)
    return figures.report("SFT, instructions", told, bars(told, spec, options.quick), options)


def bars(told: Mapping[str, Told], spec: Mapping[str, object], quick: bool) -> list[Bar]:
    if "TRL" not in told:
        return []
    ours = told["alignkit"]
    sizes = step_tokens(str(spec["rows"]))[1:]
    per_token = [cpu / size for cpu, size in zip(ours.timed("cpu"), sizes, strict=True)]
    packed = told["TRL, packed"]  # without padding: its positions are the tokens of the data
    theirs = [
        cpu / n for cpu, n in zip(packed.timed("cpu"), packed.timed("positions"), strict=True)
    ]
    padded = ratio(told["TRL"].timed("cpu"), ours.timed("cpu"))
    limits = (None, None) if quick else (1.4, 1.05)
    return [
        figures.shown("times as fast, padded", padded, limits[0]),
        figures.shown("times as fast, packed", ratio(theirs, per_token), limits[1]),
        *figures.beside(ours, told["TRL"]),
    ]


def step_tokens(path: str) -> list[int]:
    """Tokens of the rows of each step; a word is a token, and an answer ends with one more."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    sizes = [len((row["prompt"] + row["completion"]).split()) + 1 for row in rows]
    return [sum(sizes[start : start + ROWS]) for start in range(0, len(sizes), ROWS)]


if __name__ == "__main__":
    sys.exit(main())
