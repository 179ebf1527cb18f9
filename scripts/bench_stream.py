#!/usr/bin/env python
"""Does memory stay flat while a run streams a million rows?

    python scripts/bench_stream.py [--stream-rows 1000000]

A tiny model learns from one file of short pairs, each once, read as it trains. Memory is the
process's peak, above what it was before the run was built.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench_text import command, duel, figures
from bench_text.duel import Contestant
from bench_text.figures import Bar

PAIRS, PARTS, BAR = 2048, 10, 300.0


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stream-rows", type=int, default=1_000_000)


def main(given: Sequence[str] | None = None) -> int:
    options = command.read(__doc__, given, arguments, peer="none", small=True)
    pairs = 16 if options.quick else PAIRS
    num = 40 * pairs if options.quick else options.stream_rows
    spec = command.specification(options, "chat", 1, packing="bucket")
    spec |= {"rows": str(written(options.folder, num)), "batch": pairs}
    spec |= {"steps": num // pairs, "parts": PARTS, "shuffle": True}
    told = duel.compete([Contestant("alignkit", "ours", "stream", spec)], PARTS, options)
    laps = told["alignkit"].laps
    grown, later = laps[-1]["mib"], laps[-1]["mib"] - laps[0]["mib"]
    seconds = sum(lap["cpu"] for lap in laps)
    bars = [
        Bar(f"MiB over {num:,} rows", grown, None if options.quick else BAR, at_most=True),
        Bar("MiB of it after the first tenth", later),
        Bar("rows per CPU second, training", num / seconds),
    ]
    return figures.report(f"Memory over {num:,} streamed rows", told, bars, options)


def written(folder: Path, num: int) -> Path:
    """A file of `num` different short pairs."""
    path = folder / f"stream-{num}.jsonl"
    if not path.exists():
        part = path.with_suffix(".part")
        with part.open("w") as file:
            for row in range(num):
                file.write(f'{{"prompt": "row {row}", "chosen": " a{row % 97}", ')
                file.write(f'"rejected": " b{row % 89}"}}\n')
        part.rename(path)
    return path


if __name__ == "__main__":
    sys.exit(main())
