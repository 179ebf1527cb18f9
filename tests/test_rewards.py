"""Rewards by name and in sums."""

import pytest

from alignkit import ConfigError, DataError
from alignkit.preferences import by_reward
from alignkit.reward_names import reward_of
from alignkit.rewards import WeightedReward


def length(prompts, responses, rows):
    return [len(response) for response in responses]


def patchy(prompts, responses, rows):
    return [None if response == "?" else 1.0 for response in responses]


def test_a_sum_keeps_its_parts_and_what_is_missing():
    reward = reward_of([(length, 0.5), (patchy, -2)], "text")
    assert reward(["p", "p"], ["four", "?"], None) == {"length": [2.0, 0.5], "patchy": [-2.0, None]}
    (judged,) = by_reward(reward, [{"prompt": "p"}], [["four", "?"]])
    assert judged.scores == (0.0, None)  # missing is not 0


def test_a_function_is_found_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "taste_module.py").write_text(
        "def taste(p, r, rows):\n    return [7.0 for _ in r]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert reward_of("taste_module:taste", "text")(["p"], ["x"], None) == [7.0]
    with pytest.raises(ConfigError, match="no such name"):
        reward_of("taste_module:test", "text")
    with pytest.raises(ConfigError, match="cannot be imported"):
        reward_of("no_such_module:taste", "text")


def test_what_is_no_reward_is_refused():
    for given, match in ((3, "module:function"), ("pickscore", "no scorers by name for text")):
        with pytest.raises(ConfigError, match=match):
            reward_of(given, "text")
    with pytest.raises(ConfigError, match="pickscore"):
        reward_of("pikscore", "image")
    with pytest.raises(ConfigError, match="finite"):
        WeightedReward({"a": (length, float("inf"))})
    with pytest.raises(ConfigError, match="at least one"):
        WeightedReward({})
    with pytest.raises(DataError, match="one number per prompt"):
        WeightedReward({"a": (lambda *_: [1.0], 1.0)})(["p", "p"], ["a", "b"])
