"""KL controllers: the steps of Ziegler et al., and a dual variable that finds the closed form."""

from __future__ import annotations

import numpy as np
import pytest

from alignkit.errors import ConfigError
from alignkit.kl_control import AdaptiveKL, ConstraintKL, FixedKL


@pytest.mark.parametrize(
    ("kl", "after"), [(12, 0.100512), (6.6, 0.100256), (6, 0.1), (3, 0.099488)]
)
def test_steps_of_the_adaptive_controller(kl, after) -> None:
    control = AdaptiveKL(0.1, target=6.0, horizon=10_000)
    control.update(kl, 256)
    assert control.value == pytest.approx(after, abs=1e-12)


MU, SCORES = np.array([0.2, 0.5, 0.3]), np.array([1.0, 0.0, -1.0])


@pytest.mark.parametrize(
    ("target", "kl_coef", "policy"),
    [
        (0.1, 1.5592672, [0.365974, 0.481799, 0.152227]),
        (0.3, 0.8676879, [0.515659, 0.407177, 0.077164]),
    ],
)
def test_the_dual_variable_rests_at_the_closed_form(target, kl_coef, policy) -> None:
    """Exact policy gradients on three arms, the controller in the loop."""
    control, logits, p = ConstraintKL(0.1, target=target), np.log(MU), MU
    for _ in range(3000):
        for _ in range(5):
            p = np.exp(logits - np.logaddexp.reduce(logits))
            gain = SCORES - control.value * np.log(p / MU)
            logits = logits + 0.5 * p * (gain - p @ gain)
        p = np.exp(logits - np.logaddexp.reduce(logits))
        control.update(float(p @ np.log(p / MU)), 64)
    assert [control.value, *p] == pytest.approx([kl_coef, *policy], abs=1e-4)


def test_fixed_stays() -> None:
    control = FixedKL(0.05)
    control.update(100.0, 10_000)
    assert control.value == 0.05 and FixedKL(0.0).value == 0.0


@pytest.mark.parametrize("control", [FixedKL(0.2), AdaptiveKL(0.2), ConstraintKL(0.2, target=1.0)])
def test_states_come_back(control) -> None:
    control.update(3.0, 5000)
    other = type(control)(0.7)
    other.load_state_dict(control.state_dict())
    assert other.value == control.value


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"AdaptiveKL\.value"):
        AdaptiveKL(0.0)
    with pytest.raises(ConfigError, match=r"ConstraintKL\.target"):
        ConstraintKL(0.1, target=0)
    with pytest.raises(ConfigError, match="negative"):
        ConstraintKL(0.1, target=1.0, rate=5.0)


def test_one_update_never_turns_the_sign_and_stays_in_bounds() -> None:
    control = AdaptiveKL(0.1, horizon=10)
    control.update(0.0, 10_000_000)
    assert control.value == pytest.approx(0.08)
    dual = ConstraintKL(0.1, target=1.0, rate=1.0)
    for _ in range(1000):
        dual.update(0.0, 1)
    assert dual.value == dual.floor
