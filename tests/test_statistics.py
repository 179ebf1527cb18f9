"""Win rates, differences and intervals, against values worked by hand or by brute force."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from alignkit.errors import DataError
from alignkit.statistics import (
    mean,
    paired_difference,
    preference_rate,
    preferences,
    wilson,
    win_rate,
)


def test_win_rate_counts_ties_half_and_leaves_missing_out() -> None:
    before = [0.0, 1.0, 2.0, 3.0, None, 5.0]
    after = [1.0, 1.0, 1.0, 4.0, 9.0, float("nan")]
    rate = win_rate(before, after)
    assert (rate.wins, rate.ties, rate.losses) == (2, 1, 1)
    assert (rate.num, rate.missing) == (4, 2)
    assert rate.value == 2.5 / 4
    assert rate.low <= rate.value <= rate.high


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95])
def test_win_rate_interval_is_the_exact_bootstrap_over_prompts(confidence: float) -> None:
    # Six prompts, three of them ties: all 6^6 resamples can be enumerated.
    before, after = [0.0] * 6, [1.0, 1.0, 0.0, 0.0, 0.0, -1.0]
    outcome = np.array([1, 1, 0.5, 0.5, 0.5, 0])
    means = outcome[np.array(list(itertools.product(range(6), repeat=6)))].mean(axis=1)
    exact = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    rate = win_rate(before, after, confidence=confidence, num_resamples=200_000)
    assert (rate.low, rate.high) == pytest.approx(tuple(exact), abs=1e-9)
    assert rate.confidence == confidence


def test_win_rate_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator, hits = np.random.default_rng(1), 0
    for seed in range(300):
        after = generator.random(80) - 0.3  # beats 0 with probability 0.7
        rate = win_rate(np.zeros(80), after, num_resamples=1000, seed=seed)
        hits += rate.low <= 0.7 <= rate.high
    assert 0.90 <= hits / 300 <= 0.985


def test_unanimous_wins_do_not_claim_certainty() -> None:
    rate = win_rate([0.0] * 10, [1.0] * 10)
    assert rate.value == rate.high == 1
    assert rate.low == pytest.approx(10 / (10 + 1.959964**2), abs=1e-6)
    assert win_rate([1.0] * 10, [0.0] * 10).high == pytest.approx(1 - rate.low)


def test_win_rate_repeats_for_a_seed_and_prints_in_percent() -> None:
    generator = np.random.default_rng(0)
    before, after = generator.random(300), generator.random(300) + 0.3
    rate = win_rate(before, after)
    assert rate == win_rate(before, after)
    expected = f"{rate.value * 100:.1f} % [{rate.low * 100:.1f}, {rate.high * 100:.1f}], n=300"
    assert str(rate) == expected
    assert str(win_rate([0.0, 1, None], [1.0, 0, 1])).endswith("n=2, 1 missing")


def test_wilson_golden_values() -> None:
    assert wilson(65, 100) == pytest.approx((0.5525444, 0.7363575), abs=5e-8)
    low, high = wilson(0, 20)
    assert low == 0 and high == pytest.approx(3.8414588 / 23.8414588, abs=5e-8)
    assert wilson(20, 20)[1] == 1


def test_paired_difference_uses_the_pairing() -> None:
    generator = np.random.default_rng(0)
    before = generator.normal(0, 10, 200)  # spread over prompts dwarfs the effect
    change = generator.normal(0.5, 1, 200)
    found = paired_difference(before, before + change)
    assert found.value == pytest.approx(change.mean())
    assert found.after - found.before == pytest.approx(found.value)
    half = 1.96 * change.std() / np.sqrt(200)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.05)
    assert found.low > 0
    assert str(paired_difference([1.0, None], [1.5, 2.0])) == "+0.5 [+0.5, +0.5], n=1, 1 missing"


def test_resampling_in_chunks_covers_all_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = np.zeros(50), np.arange(50.0)
    whole = paired_difference(before, after, num_resamples=999)
    monkeypatch.setattr("alignkit.intervals._CELLS", 50 * 100)
    assert paired_difference(before, after, num_resamples=999) == whole


@pytest.mark.parametrize("function", [win_rate, paired_difference])
def test_impossible_scores_are_refused(function: Callable[..., object]) -> None:
    with pytest.raises(DataError, match="got 2 and 3 scores"):
        function([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(DataError, match="No prompt has a score"):
        function([None, 1.0], [1.0, None])
    with pytest.raises(DataError, match="confidence"):
        function([0.0, 1.0], [1.0, 0.0], confidence=95)


def test_wilson_refuses_impossible_counts() -> None:
    for successes, num in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(DataError, match="successes"):
            wilson(successes, num)


def test_import_is_light() -> None:
    heavy = "'torch' in sys.modules, 'matplotlib' in sys.modules"
    code = f"import sys, alignkit.statistics; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_entries_of_one_prompt_are_resampled_together() -> None:
    """Ten copies of each prompt know no more than one: the interval is that of ten times fewer."""
    generator = np.random.default_rng(3)
    values = generator.normal(size=40)
    owner = [f"prompt {i}" for i in range(40) for _ in range(10)]
    once, copied = mean(values), mean(np.repeat(values, 10), prompts=owner)
    assert copied.value == pytest.approx(once.value)
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high), abs=1e-12)
    apart = mean(np.repeat(values, 10))
    assert apart.high - apart.low < 0.5 * (copied.high - copied.low)
    with pytest.raises(DataError, match="got 1 for 40"):
        mean(values, prompts=["x"])


def test_probabilities_of_a_judge_are_a_win_rate() -> None:
    rate = preference_rate([0.9, 0.5, 0.2, None, 0.8])
    assert rate.value == pytest.approx(0.6)
    assert (rate.wins, rate.ties, rate.losses, rate.missing) == (2, 1, 1, 1)
    assert rate.low < 0.6 < rate.high


def test_preferences_keep_what_is_missing_missing() -> None:
    found = preferences([1.0, 2.0, 3.0, None], [2.0, 2.0, 1.0, 9.0])
    assert found[:3].tolist() == [1.0, 0.5, 0.0] and np.isnan(found[3])
