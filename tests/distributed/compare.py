"""How close two runs of one case are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.cases import Played, below

CLOSE = 1e-5
"""Float32 sums in another order; measured: below 3e-7 everywhere but k_proj.bias (1e-6)."""


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Norm of the difference, relative to `b`'s norm."""
    assert a.keys() == b.keys()
    apart = sum(float((a[name].double() - b[name].double()).square().sum()) for name in b)
    size = sum(float(b[name].double().square().sum()) for name in b)
    return (apart / size) ** 0.5


def measured(line: Mapping[str, float]) -> set[str]:
    """What two runs of one case agree on: not their time, nor how the batch was cut for it."""
    return {key for key in line if not key.startswith("positions/")} - {"seconds"}


def assert_same_run(a: Played, b: Played, *, later_whole: float | None = None) -> None:
    """Losses, metrics, every gradient of every step, and the final weights.

    Args:
        a: one run.
        b: the other.
        later_whole: from step 2 on, compare a step's gradient as a whole and this closely, instead
            of tensor by tensor. The first step's is always compared tensor by tensor: by then
            nothing but the order of sums can differ.
    """
    assert [line["step"] for line in a.history] == [line["step"] for line in b.history]
    for mine, theirs in zip(a.history, b.history, strict=True):
        assert mine.keys() == theirs.keys()
        for key in measured(mine):
            scale = 1.0 if key == "loss" else max(1.0, abs(theirs[key]))
            if key.startswith("log_ratio/"):  # a difference of two numbers of this size
                scale = max(scale, abs(theirs[key.replace("log_ratio", "logps")]))
            assert abs(mine[key] - theirs[key]) <= CLOSE * scale, (mine["step"], key, mine, theirs)
    assert a.gradients.keys() == b.gradients.keys() and a.gradients
    for name, gradient in a.gradients.items():
        other = b.gradients[name]
        if later_whole is None or name.startswith("1|"):
            assert (gradient - other).norm() <= CLOSE * other.norm(), name
    for step in {name.partition("|")[0] for name in a.gradients} if later_whole else ():
        mine, theirs = (below(run.gradients, step) for run in (a, b))
        assert distance(mine, theirs) <= later_whole, (step, distance(mine, theirs))
    assert distance(a.weights, b.weights) <= CLOSE


def assert_replicas(folder: Path) -> None:
    """Both processes ended with the same weights, to the last bit."""
    first, second = Played.read(folder, 0), Played.read(folder, 1)
    assert first.local["size"] == second.local["size"] == 2
    assert first.weights.keys() == second.weights.keys()
    for name, tensor in first.weights.items():
        assert torch.equal(tensor, second.weights[name]), name
    for mine, theirs in zip(first.history, second.history, strict=True):
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}


def saved_weights(run: Path) -> dict[str, Tensor]:
    """What the run's `model/` holds."""
    tensors: dict[str, Tensor] = {}
    for file in sorted((run / "model").rglob("*.safetensors")):
        tensors |= {f"{file.name}/{name}": t for name, t in load_file(file).items()}
    return tensors
