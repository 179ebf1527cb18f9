"""What sets the strength of the KL while a policy samples its own answers.

`measured_kl` is always per *answer*: the mean over answers of the summed log-ratios (k1), in nats.
A mean per token would be smaller by the answers' length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from alignkit.errors import ConfigError
from alignkit.ranges import not_negative, positive

STEP = 0.2
"""The relative error that one update reacts to, at most."""


class KLController(Protocol):
    """The strength of the KL, and what a rollout's measured KL makes of it."""

    value: float
    """`kl_coef` as it is now."""

    def update(self, measured_kl: float, n: int) -> None:
        """Called once per rollout with its KL per answer, of `n` answers on all processes."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def _error(measured_kl: float, target: float) -> float:
    return min(max(measured_kl / target - 1, -STEP), STEP)


@dataclass
class FixedKL:
    """kl_coef stays what it is."""

    value: float

    def __post_init__(self) -> None:
        not_negative("FixedKL", value=self.value)

    def update(self, measured_kl: float, n: int) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value = float(state["value"])


@dataclass
class AdaptiveKL(FixedKL):
    """kl_coef *= 1 + clip(KL / target - 1, -0.2, 0.2) n / horizon.

    Ziegler et al. 2019 (1909.08593), eq. 5, in the form of their code: n answers have been seen
    since the last update. One update of many answers changes the coefficient by a fifth at most.

    Attributes:
        value: kl_coef, above 0: it is only ever multiplied.
        target: nats per answer.
        horizon: answers; after about so many off target by a fifth or more, kl_coef is 1.2 times
            what it was, or 0.8.
    """

    target: float = 6.0
    horizon: float = 10_000.0

    def __post_init__(self) -> None:
        positive(type(self).__name__, value=self.value, target=self.target, horizon=self.horizon)

    def update(self, measured_kl: float, n: int) -> None:
        self.value *= 1 + _error(measured_kl, self.target) * min(n / self.horizon, 1.0)


@dataclass
class ConstraintKL(FixedKL):
    """max E[r] subject to KL <= target: kl_coef is the dual variable.

        kl_coef *= 1 + rate clip(KL / target - 1, -0.2, 0.2)        per rollout

    It rests where KL = target, at the coefficient whose optimum has that KL. A target that no
    coefficient reaches (all of the reward costs less) lets it sink to `floor`.

    Attributes:
        value: kl_coef to start at, above 0.
        target: nats per answer.
        rate: how fast it reacts. Slower than the policy learns, or the two chase one another.
        floor, ceiling: where it stops.
    """

    target: float = 6.0
    rate: float = 0.1
    floor: float = 1e-8
    ceiling: float = 1e8

    def __post_init__(self) -> None:
        positive("ConstraintKL", value=self.value, target=self.target, rate=self.rate)
        if self.rate * STEP >= 1:
            raise ConfigError(
                f"ConstraintKL.rate must be below {1 / STEP:g}, or one update could make kl_coef "
                f"negative; got {self.rate}."
            )

    def update(self, measured_kl: float, n: int) -> None:
        moved = self.value * (1 + self.rate * _error(measured_kl, self.target))
        self.value = min(max(moved, self.floor), self.ceiling)
