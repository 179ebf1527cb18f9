#!/usr/bin/env python
"""How much CPU time does a step of a reward model take, against TRL's RewardTrainer?

    python scripts/bench_reward.py --peer-python PATH [--rounds 6] [--rows chat]

Eight pairs a step, from the same trunk and head. The peer computes prompt and answer of each side
anew, and pads. Set up as bench_dpo.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench_text import command
from bench_text.duel import Contestant

PAIRS = 8


def main(given: Sequence[str] | None = None) -> int:
    options = command.read(__doc__, given, _more)
    spec = command.specification(options, options.rows, PAIRS)
    spec["model"] = str(with_head(Path(spec["model"])))
    found = [
        Contestant("alignkit", "ours", "reward", spec),
        Contestant("TRL", "peer", "reward", spec),
    ]
    return command.answer(f"Reward model, {options.rows}", found, options, bar=1.7, memory=None)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", choices=("chat", "long"), default="chat", help="kind of pairs")


def with_head(model: Path) -> Path:
    """The model with a head that both sides start from, beside it."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = model.parent / "scored"
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        made = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
        made.save_pretrained(folder)
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    sys.exit(main())
