"""How close two runs of one case are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.cases import Played

CLOSE = 1e-5
"""Float32 sums in another order; measured: below 3e-7 everywhere but k_proj.bias (1e-6)."""


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Norm of the difference, relative to `b`'s norm."""
    assert a.keys() == b.keys()
    apart = sum(float((a[name].double() - b[name].double()).square().sum()) for name in b)
    size = sum(float(b[name].double().square().sum()) for name in b)
    return (apart / size) ** 0.5


def assert_same_run(a: Played, b: Played, later_gradients: float = CLOSE) -> None:
    """Losses, metrics, every gradient of every step, and the final weights.

    `later_gradients` holds from step 2 on: by then the weights differ by rounding, which Adam's
    first step enlarges wherever a gradient is almost 0.
    """
    assert [line["step"] for line in a.history] == [line["step"] for line in b.history]
    for mine, theirs in zip(a.history, b.history, strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - {"seconds"}:
            scale = 1.0 if key == "loss" else max(1.0, abs(theirs[key]))
            if key.startswith("log_ratio/"):  # a difference of two numbers of this size
                scale = max(scale, abs(theirs[key.replace("log_ratio", "logps")]))
            assert abs(mine[key] - theirs[key]) <= CLOSE * scale, (mine["step"], key, mine, theirs)
    assert a.gradients.keys() == b.gradients.keys() and a.gradients
    for name, gradient in a.gradients.items():
        other = b.gradients[name]
        close = CLOSE if name.startswith("1|") else later_gradients
        assert (gradient - other).norm() <= close * other.norm(), name
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
