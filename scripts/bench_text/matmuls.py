"""How fast this machine multiplies matrices at the shapes of a step: the bound by arithmetic."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

Operand = tuple[tuple[int, ...], tuple[int, ...]]
"""Size and strides of a matrix."""


class Matmuls(TorchDispatchMode):
    """Notes the two-dimensional products that run: (left, right) -> how many."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[Operand, Operand]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = {aten.mm.default: args[:2], aten.addmm.default: args[1:3]}.get(func)
        if operands is not None:
            left, right = ((tuple(t.shape), tuple(t.stride())) for t in operands)
            self.found[left, right] += 1
        return func(*args, **(kwargs or {}))


def _like(operand: Operand) -> Tensor:
    size, strides = operand
    return torch.empty_strided(size, strides).uniform_()


def flops(found: Counter[tuple[Operand, Operand]]) -> float:
    return sum(2.0 * a[0][0] * a[0][1] * b[0][1] * times for (a, b), times in found.items())


def replay(found: Counter[tuple[Operand, Operand]], sets: int = 8) -> float:
    """CPU seconds of the same products and nothing around them.

    Up to `sets` sets of operands take turns, as in a step every layer has its own: one set would
    stay in the cache.
    """
    total = 0.0
    for (left, right), times in found.items():
        operands = [
            (_like(left), _like(right), torch.empty(left[0][0], right[0][1]))
            for _ in range(min(sets, times))
        ]
        for a, b, out in operands:
            torch.mm(a, b, out=out)
        started = time.process_time()
        for place in range(times):
            a, b, out = operands[place % len(operands)]
            torch.mm(a, b, out=out)
        total += time.process_time() - started
    return total
