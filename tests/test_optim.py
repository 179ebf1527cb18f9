"""Learning-rate schedules by hand, and what the optimizers are told."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

from alignkit.errors import ConfigError
from alignkit.optim import learning_rate_at, make_optimizer
from alignkit.options import TrainerOptions


def rates(total: int, **options: object) -> list[float]:
    given = TrainerOptions(**options)
    return [learning_rate_at(step, total, given, peak=1.0) for step in range(1, total + 1)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "constant", "warmup": 0}, [1, 1, 1, 1]),
        ({"schedule": "constant", "warmup": 2}, [1 / 2, 1, 1, 1]),
        ({"schedule": "constant", "warmup": 0.5}, [1 / 2, 1, 1, 1]),
        ({"schedule": "linear", "warmup": 0}, [4 / 5, 3 / 5, 2 / 5, 1 / 5]),
        ({"schedule": "linear", "warmup": 1}, [1, 3 / 4, 2 / 4, 1 / 4]),
        ({"schedule": "linear", "warmup": 0.25}, [1, 3 / 4, 2 / 4, 1 / 4]),
        ({"schedule": "linear", "warmup": 1.0}, [1 / 4, 2 / 4, 3 / 4, 1]),
        ({"schedule": "linear", "warmup": 9}, [1 / 4, 2 / 4, 3 / 4, 1]),
        (
            {"schedule": "cosine", "warmup": 1},
            [1, *((1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3))],
        ),
    ],
)
def test_schedule(options, expected) -> None:
    assert rates(4, **options) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("total", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("warmup", [0, 1, 5, 0.1, 0.5, 1.0])
def test_no_update_is_made_at_rate_0(schedule, total, warmup) -> None:
    found = rates(total, schedule=schedule, warmup=warmup)
    assert min(found) > 0 and max(found) <= 1


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.norm = nn.LayerNorm(3)


def test_weight_decay_spares_biases_and_norms() -> None:
    layer = Layer()
    options = TrainerOptions(weight_decay=0.1)
    optimizer = make_optimizer(list(layer.parameters()), options, 1e-3)
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    found = {name: decay[id(p)] for name, p in layer.named_parameters()}
    assert found == {"linear.weight": 0.1, "linear.bias": 0, "norm.weight": 0, "norm.bias": 0}


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_first_update_moves_against_the_gradient_by_about_the_rate(optimizer) -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    made = make_optimizer([weight], TrainerOptions(optimizer=optimizer), 1e-2)
    weight.grad = torch.full((4, 4), 3.0)
    made.step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 4), -1e-2), rtol=1e-3, atol=0)


def test_adamw_decays_by_rate_times_decay_and_not_through_the_gradient() -> None:
    weight = nn.Parameter(torch.full((2, 2), 5.0))
    made = make_optimizer([weight], TrainerOptions(weight_decay=0.1), 1e-2)
    weight.grad = torch.zeros(2, 2)
    made.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 5 * (1 - 1e-3)))


def test_8_bit_adamw_without_its_package_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"alignkit\[quantization\]"):
        make_optimizer([nn.Parameter(torch.zeros(2))], TrainerOptions(optimizer="adamw_8bit"), 1e-3)
