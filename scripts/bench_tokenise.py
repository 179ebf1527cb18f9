#!/usr/bin/env python
"""How many rows a second are tokenised, against TRL's preparation of the same preference rows?

    python scripts/bench_tokenise.py --peer-python PATH [--rounds 6]

256 pairs a round, one process and one thread each, as plain text and as conversations through a
chat template. From rows in memory to token ids, split and cut.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench_text import command, duel, figures
from bench_text.duel import Contestant
from bench_text.figures import Bar

BAR = 2.0
ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}


def main(given: Sequence[str] | None = None) -> int:
    options = command.read(__doc__, given)
    plain = options.folder / "chat.jsonl"
    files = {"plain": plain, "conversations": conversations(plain)}
    spec = command.specification(options, "chat", 1)
    sides = ["ours"] if options.no_peer else ["ours", "peer"]
    found = [
        Contestant(f"{side}, {name}", side, "tokenise", spec | {"rows": str(path)})
        for name, path in files.items()
        for side in sides
    ]
    told = duel.compete(found, options.rounds + 1, options)
    bars = []
    for name in files:
        if not options.no_peer:
            times = [told[f"{side}, {name}"].timed("cpu") for side in ("peer", "ours")]
            limit = None if options.quick else BAR
            bars.append(figures.shown(f"times as fast, {name}", figures.ratio(*times), limit))
    for name, one in told.items():
        bars.append(Bar(f"rows per second, {name}", options.world.pairs / one.median()))
    return figures.report("Tokenisation of preference rows", told, bars, options)


def conversations(path: Path) -> Path:
    """The same rows as messages."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    made = [
        {name: [{"role": ROLES[name], "content": text.strip()}] for name, text in row.items()}
        for row in rows
    ]
    messages = path.with_name("conversations.jsonl")
    messages.write_text("".join(json.dumps(row) + "\n" for row in made))
    return messages


if __name__ == "__main__":
    sys.exit(main())
