"""The length-controlled win rate against simulation and a fit written anew."""

from __future__ import annotations

import numpy as np
import pytest

from alignkit.errors import DataError
from alignkit.length_control import length_controlled_win_rate
from alignkit.statistics import preference_rate, preferences


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def newton(columns, target, steps=40):
    """Maximum likelihood by iteratively reweighted least squares, in float64."""
    at = np.zeros(columns.shape[1])
    for _ in range(steps):
        share = sigmoid(columns @ at)
        bend = columns.T @ (columns * (share * (1 - share))[:, None])
        at = at + np.linalg.solve(bend, columns.T @ (target - share))
    return at


def test_a_planted_length_bias_is_removed() -> None:
    """The judge likes length alone and the second policy writes longer: 1/2 is the truth."""
    draw = np.random.default_rng(0)
    before = draw.normal(100, 20, 20_000)
    after = draw.normal(130, 20, 20_000)
    change = (after - before) / (after - before).std()
    found = (draw.random(20_000) < sigmoid(1.5 * np.tanh(change))).astype(float)
    rate = length_controlled_win_rate(found, before, after, num_resamples=40)
    assert rate.plain > 0.68
    assert rate.value == pytest.approx(0.5, abs=0.012)
    assert rate.slope == pytest.approx(1.5, abs=0.08)
    assert rate.low < 0.5 < rate.high and rate.slope_low < 1.5 < rate.slope_high


def test_a_true_advantage_stays() -> None:
    draw = np.random.default_rng(1)
    before, after = draw.normal(100, 20, (2, 20_000))
    change = (after - before) / (after - before).std()
    found = (draw.random(20_000) < sigmoid(0.8 - 2 * np.tanh(change))).astype(float)
    rate = length_controlled_win_rate(found, before, after, num_resamples=20)
    assert rate.value == pytest.approx(sigmoid(0.8), abs=0.01)


def test_a_covariate_takes_quality_apart_from_length() -> None:
    """Labels s(dq + dlen / 2): the rate at equal length is the mean of s(dq)."""
    draw = np.random.default_rng(2)
    quality, length = draw.normal(0.4, 1, 20_000), draw.normal(0.5, 0.3, 20_000)
    found = (draw.random(20_000) < sigmoid(quality + 2 * np.tanh(length / length.std()))) * 1.0
    zero = np.zeros(20_000)
    rate = length_controlled_win_rate(found, zero, length, covariate=quality, num_resamples=20)
    assert rate.value == pytest.approx(sigmoid(quality).mean(), abs=0.01)


def test_the_fit_is_the_maximum_likelihood() -> None:
    draw = np.random.default_rng(3)
    before, after = draw.integers(5, 60, (2, 400))
    found = draw.choice([0, 0.5, 1], 400, p=[0.3, 0.2, 0.5])
    change = (after - before).astype(float)
    columns = np.column_stack([np.ones(400), np.tanh(change / change.std())])
    theta, phi = newton(columns, found)
    rate = length_controlled_win_rate(found, before, after, num_resamples=2)
    # The ridge moves the coefficients by about RIDGE / (n / 4).
    assert rate.value == pytest.approx(sigmoid(theta), abs=1e-4)
    assert rate.slope == pytest.approx(phi, abs=1e-3)


def test_equal_lengths_change_nothing() -> None:
    found = preferences([0.0] * 60, [1.0] * 35 + [0.0] * 5 + [-1.0] * 20)
    lengths = np.full(60, 12)
    rate, plain = length_controlled_win_rate(found, lengths, lengths), preference_rate(found)
    assert (rate.value, rate.low, rate.high) == (plain.value, plain.low, plain.high)
    assert rate.slope == 0


@pytest.mark.slow
def test_the_interval_covers_the_truth() -> None:
    draw, hits = np.random.default_rng(4), 0
    for seed in range(60):
        change = draw.normal(0.5, 1, 120)
        chance = sigmoid(0.6 + np.tanh(change / change.std()))
        found = (draw.random(120) < chance).astype(float)
        rate = length_controlled_win_rate(
            found, np.zeros(120), change, num_resamples=150, seed=seed
        )
        hits += rate.low <= sigmoid(0.6) <= rate.high
    assert 0.85 <= hits / 60 <= 1.0


def test_one_sided_comparisons_stay_finite() -> None:
    longer = np.arange(1.0, 21)
    won = length_controlled_win_rate(np.ones(20), np.zeros(20), longer, num_resamples=20)
    assert 0.5 < won.value <= 1 and np.isfinite(won.slope)
    split = length_controlled_win_rate(
        (longer > 10).astype(float), np.full(20, 10.5), longer, num_resamples=20
    )
    assert np.isfinite([split.low, split.high, split.slope]).all()


def test_what_cannot_be_told_apart_is_refused() -> None:
    with pytest.raises(DataError, match="all of them differ by 3"):
        length_controlled_win_rate([1, 0, 1], [1, 2, 3], [4, 5, 6])
    with pytest.raises(DataError, match="needs a length"):
        length_controlled_win_rate([1, 0], [1, None], [4, 6])
    rate = length_controlled_win_rate([1, None, 0], [1, None, 2], [4, 4, 1], num_resamples=2)
    assert (rate.num, rate.missing) == (2, 1)
