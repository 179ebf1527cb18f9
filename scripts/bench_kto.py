#!/usr/bin/env python
"""How much CPU time does a KTO step take, against TRL's on the same labelled answers?

    python scripts/bench_kto.py --peer-python PATH [--rounds 6]

Eight answers a step, half of them liked, and eight mismatched ones for the KL baseline. Which
answer meets which prompt differs by design, so losses are not compared. Set up as bench_dpo.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench_text import command
from bench_text.duel import Contestant

ANSWERS = 8


def main(given: Sequence[str] | None = None) -> int:
    options = command.read(__doc__, given)
    spec = command.specification(options, "labelled", ANSWERS)
    found = [Contestant("alignkit", "ours", "kto", spec), Contestant("TRL", "peer", "kto", spec)]
    question = "KTO, labelled answers"
    return command.answer(question, found, options, bar=1.5, memory=None, same_losses=False)


if __name__ == "__main__":
    sys.exit(main())
