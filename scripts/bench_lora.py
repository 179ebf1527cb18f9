#!/usr/bin/env python
"""How much CPU time does a DPO step with a LoRA adapter take, against TRL's on the same pairs?

    python scripts/bench_lora.py --peer-python PATH [--rounds 6]

Rank 16 on every linear layer of the blocks, the reference is the model with the adapter off, in
both. Set up as bench_dpo.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench_text import command
from bench_text.duel import Contestant

PAIRS, RANK = 4, 16


def main(given: Sequence[str] | None = None) -> int:
    options = command.read(__doc__, given)
    spec = command.specification(options, "chat", PAIRS, lora=RANK)
    found = [Contestant("alignkit", "ours", "dpo", spec), Contestant("TRL", "peer", "dpo", spec)]
    return command.answer("DPO with LoRA, chat rows", found, options, bar=2.0, memory=None)


if __name__ == "__main__":
    sys.exit(main())
