"""What a contestant measures of itself, step by step, in its own process.

A contestant calls `started()` when it is ready and `lap(...)` after every step. Both report on one
line of standard output and wait for a line of standard input before they return, so that whoever
started the processes decides whose turn it is. Waiting costs no CPU time.

This file is read by the peer's Python, too: it needs torch and nothing else.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

MARK = "@@ "


class Meter:
    """CPU time of the process, peak memory, and positions that went through the policy.

    Args:
        alone: do not report or wait: for a contestant without an opponent, in this process.
    """

    def __init__(self, *, alone: bool = False) -> None:
        self.alone = alone
        self.laps: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self.positions = 0
        self.reads: Counter[str] = Counter()
        self._stack = ExitStack()
        self._before = peak_mib()
        self._cpu = self._wall = 0.0

    def count(self, model: Any) -> None:
        """Count the positions that `model` computes with gradient."""
        import torch

        def hook(module: Any, inputs: Any) -> None:
            if torch.is_grad_enabled():
                self.positions += inputs[0].numel()

        model.get_input_embeddings().register_forward_pre_hook(hook)

    def watch(self, model: Any) -> None:
        """Count what reads the device, from here on; laps then tell `reads`."""
        from bench_text.reads import Reads

        self.reads = self._stack.enter_context(Reads(model)).found

    def imported(self) -> None:
        """From here on memory is counted: the imports are done."""
        self._before = peak_mib()

    def started(self, **facts: Any) -> None:
        self._turn({"ready": facts})

    @staticmethod
    def clock() -> float:
        """CPU seconds of this process, all threads, in user and system mode."""
        return time.process_time()

    def lap(self, **facts: Any) -> None:
        """The end of a step, with what else is to be told of it."""
        self.laps.append(
            {
                "cpu": self.clock() - self._cpu,
                "wall": time.perf_counter() - self._wall,
                "positions": self.positions,
                "mib": peak_mib() - self._before,
                "reads": {name: num for name, num in self.reads.items() if num},
                **{name: float(value) for name, value in facts.items()},
            }
        )
        self.positions = 0
        self._turn(self.laps[-1])
        self.reads.clear()

    def close(self) -> None:
        self._stack.close()

    def _turn(self, told: dict[str, Any]) -> None:
        if not self.alone:
            print(MARK + json.dumps(told), flush=True)
            sys.stdin.readline()
        self._wall, self._cpu = time.perf_counter(), self.clock()


def peak_mib() -> float:
    """The largest resident size of this process so far; where that is not told, 0."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def versions(*packages: str) -> dict[str, str]:
    return {name: version(name) for name in packages}


def main() -> None:
    """python -m bench_text.meter SIDE QUESTION SPEC: one contestant, until its steps are done."""
    side, question, spec = sys.argv[1:]
    import torch

    torch.set_num_threads(1)
    contest: Callable[..., None] = getattr(importlib.import_module(f"bench_text.{side}"), question)
    contest(json.loads(spec), Meter())


if __name__ == "__main__":
    main()
