"""Rejection sampling: what is kept and learnt, round by round, and what a kill costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import alignkit.best_of
from alignkit import (
    DPO,
    SFT,
    CheckpointError,
    ConfigError,
    DataError,
    GenerationOptions,
    RejectionSampling,
    TrainerOptions,
    align,
    build,
)
from alignkit.best_of import pick, told
from tests.proofs.tabular import probabilities_of, tabular_lm

ARMS = ["ash", "birch", "red cedar", "red oak"]
PROMPTS = [{"prompt": "north ", "tag": n} for n in range(5)]
SHORT = TrainerOptions(max_steps=2, batch_size=5, learning_rate=0.1, warmup=0, precision="fp32")
ROOM = GenerationOptions(max_new_tokens=4)


class Lengths:
    """Longer is better. Counts what it is asked, and fails when it is told to."""

    def __init__(self, fails_at: int = -1) -> None:
        self.asked: list[int] = []
        self.rows: list[Any] = []
        self.fails_at = fails_at

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str], rows: Any) -> list[float]:
        if len(self.asked) == self.fails_at:
            raise OSError("the scorer is away")
        self.asked.append(len(responses))
        self.rows += rows
        return [float(len(text)) for text in responses]


def world() -> Any:
    return tabular_lm(["north"], ARMS, [[0.3, 0.3, 0.2, 0.2]])


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    for part in world():
        part.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignkit.best_of, "PART", 2)


def run(policy: Any, reward: Any, folder: Path | None, **more: Any) -> Any:
    method = RejectionSampling(samples_per_prompt=3, **more.pop("method", {}))
    given = {"generation": ROOM, "trainer": SHORT, "run_dir": folder, **more}
    return align(policy, method, PROMPTS, reward=reward, **given)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_best_of_each_prompt_is_learnt_over_rounds(policy: Path, tmp_path: Path) -> None:
    folder, reward = tmp_path / "run", Lengths()
    result = run(policy, reward, folder, method={"rounds": 2, "temperatures": (1.0, 1.3)})
    assert sum(reward.asked) == 2 * 3 * 5
    assert {row["tag"] for row in reward.rows} == set(range(5)), "the reward sees the rows"
    best: list[float] = [-1.0] * 5
    for number in (1, 2):
        parts = sorted((folder / "answers" / f"round-{number}").iterdir())
        assert len(parts) == 3
        answered = [row for part in parts for row in lines(part)]
        learnt = lines(folder / "answers" / f"round-{number}.jsonl")
        assert len(answered) == len(learnt) == 5
        for place, (row, one) in enumerate(zip(answered, learnt, strict=True)):
            assert len(row["responses"]) == 3 and row["cut"] == [False] * 3
            assert row["scores"] == [len(text) for text in row["responses"]]
            best[place] = max(best[place], *row["scores"])
            assert len(one["completion"]) == one["score"] == best[place]
    first = yaml.safe_load((folder / "rounds" / "round-1" / "config.yaml").read_text())
    last = yaml.safe_load((folder / "config.yaml").read_text())
    assert first["policy"] == str(policy)
    assert last["policy"] == str(folder / "rounds" / "round-1" / "model")
    assert last["method"]["name"] == "sft" and last["data"].endswith("round-2.jsonl")
    assert result.run_dir == folder and (folder / "report.html").exists()
    assert result.metrics["best_of/best"] == sum(best) / 5 > result.metrics["best_of/scores"]
    again = run(policy, Lengths(0), folder, method={"rounds": 2, "temperatures": (1.0, 1.3)})
    assert again.metrics == pytest.approx(result.metrics), "a finished run asks for nothing"


def test_a_kill_while_scoring_loses_no_scored_answer(policy: Path, tmp_path: Path) -> None:
    whole = Lengths()
    run(policy, whole, tmp_path / "whole")
    broken = Lengths(fails_at=2)
    with pytest.raises(DataError, match="the scorer is away"):
        run(policy, broken, tmp_path / "broken")
    rest = Lengths()
    run(policy, rest, tmp_path / "broken")
    assert broken.asked + rest.asked == whole.asked, "what was scored is not scored again"
    for name in ("answers/round-1.jsonl", "metrics.jsonl"):
        found, expected = (lines(tmp_path / run / name) for run in ("broken", "whole"))
        for line in (*found, *expected):
            line.pop("seconds", None)
        assert found == expected


def test_a_model_in_hand_trains_in_place_without_a_folder() -> None:
    model, tokenizer = world()
    before = probabilities_of(model)[0]
    result = run((model, tokenizer), Lengths(), None)
    assert result.model is model and result.metrics["best_of/prompts"] == 5
    (after,) = probabilities_of(model)
    assert after[2] > before[2] and after[0] < before[0]


@pytest.mark.slow
def test_the_loop_is_open(policy: Path, tmp_path: Path) -> None:
    loop = build(
        policy,
        RejectionSampling(samples_per_prompt=2, rounds=2, start="first"),
        PROMPTS,
        reward=Lengths(),
        generation=ROOM,
        trainer=SHORT,
        run_dir=tmp_path / "run",
    )
    assert [record.step for record in loop.steps()] == [1, 2, 1, 2]
    assert loop.finish().run_dir == tmp_path / "run"
    last = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert last["policy"] == str(policy)


@pytest.mark.slow
def test_changed_arguments_are_refused(policy: Path, tmp_path: Path) -> None:
    run(policy, Lengths(), tmp_path / "run")
    with pytest.raises(CheckpointError, match="keep_earlier: true before, false now"):
        run(policy, Lengths(), tmp_path / "run", method={"keep_earlier": False})
    with pytest.raises(CheckpointError, match="no run"):
        run(policy, Lengths(), tmp_path / "other", resume="must")
    anew = Lengths()
    run(policy, anew, tmp_path / "run", method={"keep_earlier": False}, resume="never")
    assert sum(anew.asked) == 15


def answered(*rows: tuple[Sequence[str], Sequence[float | None], Sequence[bool]]) -> list[Any]:
    return [
        {"prompt": f"p{n}", "responses": texts, "scores": scores, "cut": cut}
        for n, (texts, scores, cut) in enumerate(rows)
    ]


def test_what_is_cut_or_has_no_score_is_never_picked() -> None:
    rows = answered(
        (["a", "b", "c"], [1.0, 5.0, None], [False, True, False]),
        (["d"], [None], [False]),
        ([], [], []),
    )
    best = pick(rows, {}, seed=0, number=1)
    assert {place: one["completion"] for place, one in best.items()} == {0: "a"}
    assert told(rows, best) == pytest.approx(
        {"best_of/scores": 3.0, "best_of/best": 1.0, "best_of/cut": 0.25, "best_of/prompts": 1}
    )
    with pytest.raises(DataError, match="nothing to learn from"):
        pick(rows[1:], {}, seed=0, number=1)


def test_equal_ones_are_drawn_from_and_earlier_ones_stay_until_beaten() -> None:
    rows = answered(*[(["a", "b", "c"], [1.0, 1.0, 0.0], [False] * 3)] * 400)
    first = pick(rows, {}, seed=0, number=1)
    share = sum(one["completion"] == "a" for one in first.values()) / 400
    assert 0.4 < share < 0.6
    assert pick(rows, {}, seed=0, number=1) == first
    worse = answered(
        *[(["z", "better"], [0.5, 2.0 if n == 7 else 0.1], [False] * 2) for n in range(400)]
    )
    kept = pick(worse, first, seed=0, number=2)
    assert kept[7]["completion"] == "better"
    assert {n: one for n, one in kept.items() if n != 7} == {
        n: one for n, one in first.items() if n != 7
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_prompt": 0}, "samples_per_prompt"),
        ({"rounds": True}, "rounds"),
        ({"temperatures": ()}, "temperatures"),
        ({"temperatures": (0.0,)}, "temperatures"),
        ({"samples_per_prompt": 1, "temperatures": (1.0, 1.2)}, "cannot have them all"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RejectionSampling(**options)


def test_what_does_not_go_together() -> None:
    method = RejectionSampling()
    for given, message in (
        ({}, "nothing that scores"),
        ({"reward": Lengths(), "judge": Lengths()}, "leave judge out"),
        ({"reward": Lengths(), "reference": "frozen"}, "no reference"),
    ):
        with pytest.raises(ConfigError, match=message):
            align(world(), method, PROMPTS, **given)
    with pytest.raises(ConfigError, match="from folder to folder"):
        align(world(), RejectionSampling(rounds=2), PROMPTS, reward=Lengths())
    with pytest.raises(DataError, match="row 0 has None"):
        align(world(), method, [{"text": "x"}], reward=Lengths())
    for other in (SFT(), DPO()):
        with pytest.raises(ConfigError, match="reward is used by online methods"):
            align(world(), other, PROMPTS, reward=Lengths())
