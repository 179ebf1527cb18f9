#!/usr/bin/env python
"""How long does a loss take, with its gradient, on 4,096 pairs and one core?

    python scripts/bench_losses.py [--pairs 4096] [--repeats 50] [--bar 3.0]

Prints the median milliseconds of every loss of the tables (rankings of two answers, twice as many
single answers) and exits with 1 if one is above the bar.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch

from alignkit.losses import (
    LOSSES,
    GroupLoss,
    GroupScores,
    Loss,
    PairLoss,
    PairScores,
    UnpairedScores,
)


def make(row: Loss, num: int) -> tuple[Any, list[torch.Tensor]]:
    """Random float32 scores of the row's kind with every field it may use, and their leaves."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * 3 - 40

    def lengths(*shape: int) -> torch.Tensor:
        return torch.randint(1, 200, shape, generator=draw).float()

    if isinstance(row, PairLoss):
        leaves = [normal(num).requires_grad_() for _ in range(2)]
        scores: Any = PairScores(
            *leaves,
            normal(num),
            normal(num),
            chosen_length=lengths(num),
            rejected_length=lengths(num),
            score_chosen=torch.ones(num),
            score_rejected=torch.zeros(num),
            uniform=torch.rand(num, generator=draw),
        )
    elif isinstance(row, GroupLoss):
        leaves = [normal(num, 2).requires_grad_()]
        rank = torch.tensor([0, 1]).expand(num, 2)
        scores = GroupScores(leaves[0], normal(num, 2), rank, torch.ones(num, 2).bool())
    else:
        leaves = [normal(2 * num).requires_grad_()]
        liked = torch.arange(2 * num) % 2 == 0
        kl = torch.randn(2 * num, generator=draw)
        scores = UnpairedScores(leaves[0], normal(2 * num), liked, kl=kl)
    return scores, leaves


def milliseconds(row: Loss, num: int, repeats: int) -> float:
    """The median time of state, loss and gradient."""
    scores, leaves = make(row, num)
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        state = row.next_state(scores, {}, beta=0.1)
        loss = row(scores, beta=0.1, state=state).sum()
        torch.autograd.grad(loss, leaves, allow_unused=True)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--bar", type=float, default=3.0, help="milliseconds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    slow = []
    for name, row in LOSSES.items():
        found = milliseconds(row, options.pairs, options.repeats)
        slow += [name] if found > options.bar else []
        print(f"{name:20} {found:7.3f} ms")
    print(
        f"{len(LOSSES)} losses on {options.pairs} pairs; above {options.bar} ms: {slow or 'none'}"
    )
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
