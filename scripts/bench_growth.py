#!/usr/bin/env python
"""Does the time of a step grow in a straight line with its tokens?

    python scripts/bench_growth.py [--doublings 5]

DPO steps of 1,024 tokens and of twice as many, up to 32,768, made of the same lengths, so that
nothing but their number changes. The line is the one that fits best in relative terms.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from bench_text import command, duel, figures
from bench_text.duel import Contestant
from bench_text.figures import Bar

LENGTHS = ((150, 95, 79), (160, 130, 96))
"""Prompt, chosen and rejected words of two pairs: 1,024 tokens, prompts counted twice, with eos."""
TOKENS, BAR = 1024, 0.10


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--doublings", type=int, default=5)


def main(given: Sequence[str] | None = None) -> int:
    options = command.read(__doc__, given, arguments, peer="none")
    doublings = min(2, options.doublings) if options.quick else options.doublings
    sizes = [2**power for power in range(doublings + 1)]
    rows = str(rows_of_like_lengths(options.folder, 2 * sizes[-1]))
    spec = command.specification(options, "chat", 1, sizes=sizes)
    spec |= {"batch": len(LENGTHS), "rows": rows, "max_length": 512}
    told = duel.compete([Contestant("alignkit", "ours", "growth", spec)], len(sizes), options)
    tokens = np.array(sizes) * TOKENS
    seconds = np.array([lap["cpu"] for lap in told["alignkit"].laps])
    apart = from_line(tokens, seconds)
    for size, took in zip(tokens.tolist(), seconds.tolist(), strict=True):
        print(f"{size:6} tokens  {took:8.3f} s  {1e3 * took / size:.3f} ms a token")
    bars = [Bar("furthest from the line", apart, None if options.quick else BAR, at_most=True)]
    return figures.report("Seconds per step against tokens per step", told, bars, options)


def rows_of_like_lengths(folder: Path, copies: int) -> Path:
    """`copies` of two pairs in length, in the words of the chat-like rows."""
    lines = (folder / "chat.jsonl").read_text().splitlines()
    words = " ".join(json.loads(line)["prompt"] for line in lines).split()
    path, place, made = folder / "growth.jsonl", 0, []
    for length in LENGTHS * copies:
        row = {}
        for name, num in zip(("prompt", "chosen", "rejected"), length, strict=True):
            row[name] = "".join(f" {words[(place + k) % len(words)]}" for k in range(num))
            place += num
        made.append(json.dumps(row) + "\n")
    path.write_text("".join(made))
    return path


def from_line(x: np.ndarray, y: np.ndarray) -> float:
    """The largest relative distance from the line with the least squares of relative distances."""
    columns = np.stack([np.ones_like(y), x], axis=1) / y[:, None]
    line, *_ = np.linalg.lstsq(columns, np.ones_like(y), rcond=None)
    return float(np.abs(columns @ line - 1).max())


if __name__ == "__main__":
    sys.exit(main())
