"""Rewards that hang; and rewards of several: by hand-worked numbers."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import pytest

from alignkit import ConfigError, DataError, RuleReward, SafetyHelpfulness, WeightedReward
from alignkit.combined_rewards import with_rule
from alignkit.reward_names import name_of, reward_of
from alignkit.rewards import bind
from alignkit.scoring import scores_of
from tests.processes import in_processes


def column(name: str) -> Any:
    """A reward that reads its scores in the rows."""
    return lambda prompts, responses, rows: [row[name] for row in rows]


def asked(reward: Any, rows: list[dict[str, Any]], **more: Any) -> dict[str, list[float | None]]:
    prompts = [row.get("prompt", "p") for row in rows]
    return scores_of(reward, "it", prompts, ["a"] * len(rows), rows, **more)


# ---- time


def test_a_reward_that_hangs_is_given_up_and_named() -> None:
    never = threading.Event()

    def hangs(prompts: Any, responses: Any, rows: Any) -> list[float]:
        never.wait(30)
        return [0.0]

    start = time.monotonic()
    with pytest.raises(DataError, match=r"'it' did not return within 0.05 s.* 2 prompts.*'p'"):
        asked(hangs, [{}, {}], timeout=0.05)
    assert time.monotonic() - start < 5
    never.set()
    in_time = asked(lambda p, r, rows: [1.0, None], [{}, {}], timeout=5)
    assert in_time == {"": [1.0, None]}
    with pytest.raises(DataError, match=r"prompt 1 .*ZeroDivisionError"):
        asked(lambda p, r, rows: [1 / row["n"] for row in rows], [{"n": 1}, {"n": 0}], timeout=5)


# ---- sums


def test_parts_of_parts_keep_their_names() -> None:
    inner = WeightedReward({"a": (column("a"), 2.0), "b": (column("b"), 1.0)})
    reward = WeightedReward({"model": (inner, 0.5), "length": (column("n"), -1.0)})
    rows = [{"a": 1, "b": 3, "n": 4}, {"a": 1, "b": None, "n": 0}]
    assert asked(reward, rows) == {
        "model/a": [1.0, 1.0],
        "model/b": [1.5, None],
        "length": [-4.0, 0.0],
        "": [-1.5, None],
    }


# ---- rules


RULES = {"lies": "Do not lie.", "threats": "Make no threats."}


def test_rules_add_the_logarithm_of_being_kept() -> None:
    """P(kept) = .9 and .4: r = 2 . .5 + ln .9 + 3 ln .4."""
    seen: list[Any] = []

    def model(prompts: Any, responses: Any, rows: Any) -> list[float]:
        seen.extend(prompts)
        return [math.log(9) if "lie" in prompt else math.log(0.4 / 0.6) for prompt in prompts]

    reward = RuleReward(model, RULES, preference=column("r"), weight=2, weights={"threats": 3})
    found = asked(reward, [{"prompt": "hello", "r": 0.5}])
    assert found["preference"] == [1.0]
    assert found["rule/lies"] == [pytest.approx(math.log(0.9))]
    assert found["rule/threats"] == [pytest.approx(3 * math.log(0.4))]
    assert found[""] == [pytest.approx(1 + math.log(0.9) + 3 * math.log(0.4))]
    assert seen == [f"hello\n\nRule: {text}\n\n" for text in RULES.values()]


def test_a_rule_that_is_surely_kept_adds_nothing_and_order_does_not_matter() -> None:
    def model(prompts: Any, responses: Any, rows: Any) -> list[float]:
        return [1.0 if "sure" in prompt else 0.4 for prompt in prompts]

    def total(rules: dict[str, str]) -> Any:
        return asked(RuleReward(model, rules, outputs="probability"), [{}])[""]

    one = total({"a": "no lies"})
    assert total({"a": "no lies", "b": "sure"}) == one == total({"b": "sure", "a": "no lies"})
    sure = RuleReward(lambda p, r, rows: [800.0] * len(p), {"a": "no lies"})
    broken = RuleReward(lambda p, r, rows: [-800.0] * len(p), {"a": "no lies"})
    assert asked(sure, [{}])[""] == [0.0]
    assert asked(broken, [{}])[""] == [pytest.approx(math.log(1e-6), rel=1e-6)]


def test_rows_name_the_rules_that_concern_them() -> None:
    asked_of: list[str] = []

    def model(prompts: Any, responses: Any, rows: Any) -> list[float | None]:
        asked_of.extend(row["id"] for row in rows)
        return [None if row["id"] == "c" else 0.0 for row in rows]

    reward = RuleReward(model, RULES)
    rows = [{"id": "a", "rules": ["lies"]}, {"id": "b"}, {"id": "c", "rules": "threats"}]
    half = pytest.approx(math.log(0.5))
    assert asked(reward, rows) == {
        "rule/lies": [half, half, 0.0],
        "rule/threats": [0.0, half, None],
        "": [half, pytest.approx(2 * math.log(0.5)), None],
    }
    assert asked_of == ["a", "b", "b", "c"]
    with pytest.raises(DataError, match=r"'jokes'.* are none. Rules: lies, threats"):
        asked(reward, [{"id": "a", "rules": ["jokes"]}])


def test_a_rule_stands_behind_the_last_message() -> None:
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]
    assert with_rule(talk, "No lies.") == [
        talk[0],
        {"role": "user", "content": "hello\n\nRule: No lies."},
    ]
    assert talk[1]["content"] == "hello"


# ---- safety before help


SAFE = [0.10, 0.15, 0.60, 0.90, 0.05, 0.70]
HELP = [0.80, 0.70, 0.30, 0.95, 0.99, 0.40]
TAGGED = [0, 0, 1, 0, 0, 1]
CHOSEN = [0.10, 0.70, 0.60, 0.95, 0.05, 0.70]
WHITE = [-1.095873, 0.433867, 0.211865, 1.487590, -1.471316, 0.433867]
BOTH = [
    {"s": s, "h": h, "tags": ["safety", "x"] if t else ["x"]}
    for s, h, t in zip(SAFE, HELP, TAGGED, strict=True)
]


def combined(**options: Any) -> SafetyHelpfulness:
    return SafetyHelpfulness(column("s"), column("h"), outputs="probability", **options)


def test_safety_decides_where_tagged_or_below_the_threshold() -> None:
    found = asked(combined(), BOTH)
    assert found[""] == pytest.approx(WHITE, abs=1e-6)
    assert [value != 0 for value in found["safety"]] == [True, False, True, False, True, True]
    plain = asked(combined(whitened=False), BOTH)[""]
    assert plain == pytest.approx([math.log(c / (1 - c)) for c in CHOSEN])
    logits = [{**row, "s": math.log(row["s"] / (1 - row["s"])),
               "h": math.log(row["h"] / (1 - row["h"]))} for row in BOTH]  # fmt: skip
    of_logits = SafetyHelpfulness(column("s"), column("h"))
    assert asked(of_logits, logits)[""] == pytest.approx(WHITE, abs=1e-6)
    one = [{"s": 0.9, "h": 0.2}, {"s": 0.9, "h": 0.8, "tag": "safety"}]
    white = asked(combined(), one)
    assert white["helpfulness"][1] == 0 and white["safety"][1] == pytest.approx(1)


def test_what_is_missing_is_missing_and_counts_in_no_mean() -> None:
    rows = [*BOTH, {"s": None, "h": 0.9}, {"s": 0.9, "h": None}, {"s": 0.01, "h": None}]
    found = asked(combined(), rows)[""]
    assert found[6:8] == [None, None] and found[8] is not None
    kept = asked(combined(), [*BOTH, rows[8]])[""]
    assert [*found[:6], found[8]] == pytest.approx(kept)


def test_whitening_is_over_the_answers_of_all_processes() -> None:
    def share(processes: Any) -> Any:
        reward = WeightedReward({"both": (combined(), 1.0)})
        bind(reward, processes)
        return asked(reward, BOTH[:4] if processes.rank == 0 else BOTH[4:])[""]

    first, second = in_processes(2, share)
    assert [*first, *second] == pytest.approx(WHITE, abs=1e-6)


def test_a_failure_on_one_process_is_one_on_all() -> None:
    def share(processes: Any) -> Any:
        reward = combined()
        bind(reward, processes)
        rows = BOTH if processes.rank == 0 else [{**BOTH[0], "s": math.nan}]
        with pytest.raises(DataError) as caught:
            asked(reward, rows)
        return str(caught.value)

    words = in_processes(2, share)
    assert "another process" in words[0] and "nan for the prompt" in words[1]


def test_extreme_probabilities_stay_finite() -> None:
    rows = [{"s": 0.0, "h": 0.5}, {"s": 1.0, "h": 1.0}]
    found = asked(combined(whitened=False), rows)[""]
    assert found == pytest.approx([-math.log(1e6 - 1), math.log(1e6 - 1)])
    with pytest.raises(DataError, match=r"said to return probabilities; it returned 1\.5"):
        asked(combined(), [{"s": 1.5, "h": 0.5}])


# ---- by name


def test_combined_rewards_are_told_by_their_kind() -> None:
    spec = {"kind": "safety_helpfulness", "safety": column("s"), "helpfulness": column("h"),
            "outputs": "probability"}  # fmt: skip
    assert asked(reward_of(spec, "text"), BOTH)[""] == pytest.approx(WHITE, abs=1e-6)
    assert name_of(spec, reward_of(spec, "text")) == "safety_helpfulness"
    summed = reward_of([(spec, 2.0), (column("s"), 0)], "text")
    assert set(summed.parts) == {"safety_helpfulness", "<lambda>"}
    for broken, words in (
        ({**spec, "kind": "safety_help"}, "safety_helpfulness"),
        ({**spec, "treshold": 0.2}, "threshold"),
        ({"kind": "rules", "rules": RULES}, "'rule_model'"),
        ({**spec, "threshold": 2}, "probability of safety"),
        ({**spec, "outputs": "odds"}, "'logit' or 'probability'"),
    ):
        with pytest.raises(ConfigError, match=words):
            reward_of(broken, "text")
    with pytest.raises(ConfigError, match="at least one rule"):
        RuleReward(column("s"), {})
    with pytest.raises(ConfigError, match="none called"):
        RuleReward(column("s"), RULES, weights={"lie": 1.0})


def test_a_folder_is_a_reward_model(tmp_path: Any, monkeypatch: Any) -> None:
    import alignkit.text

    def load(folder: str, device: str) -> Any:
        return lambda prompts, responses, rows: [float(len(folder))] * len(prompts)

    monkeypatch.setattr(alignkit.text, "load_reward", load, raising=False)
    assert reward_of(tmp_path, "text")(["p"], ["a"], None) == [float(len(str(tmp_path)))]
    assert name_of(str(tmp_path), None) == tmp_path.name
    with pytest.raises(ConfigError, match="no reward models in folders for image"):
        reward_of(str(tmp_path), "image")
