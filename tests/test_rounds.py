"""Rounds of sampling, labelling and training: who answers, who is compared with whom, resuming."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from alignkit import (
    DPO,
    KTO,
    SFT,
    CheckpointError,
    ConfigError,
    DataError,
    GenerationOptions,
    LoRA,
    TextOptions,
    TrainerOptions,
    align_rounds,
)
from alignkit.draws import generator
from alignkit.losses import PREFERENCE_LOSSES
from alignkit.text import build
from tests.builders import tiny_lm, tiny_tokenizer

PROMPTS = ["the sky?", "a fox?", "some tea?", "the river?"]
FEW = GenerationOptions(max_new_tokens=4)
SHORT = TrainerOptions(max_steps=2, batch_size=4, learning_rate=1e-2, warmup=0, log_every=1)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tiny_lm("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


class Letters:
    """More letters are better; counts how often it is asked, and fails on demand."""

    def __init__(self) -> None:
        self.asked, self.fails = 0, False

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str], rows: Any) -> list[float]:
        self.asked += 1
        if self.fails:
            raise OSError("the scorer is away")
        return [float(sum(c.isalpha() for c in text)) for text in responses]


def run(policy: Path, folder: Path, reward: Any = None, **more: Any) -> Any:
    labels = {} if "judge" in more else {"reward": reward or Letters()}
    given = {"rounds": 2, "samples_per_prompt": 3, "generation": FEW, "trainer": SHORT}
    return align_rounds(
        policy, more.pop("method", DPO()), PROMPTS, run_dir=folder, **{**given, **labels, **more}
    )


def rows_of(folder: Path, number: int) -> list[dict[str, Any]]:
    lines = (folder / "answers" / f"round-{number}" / "metadata.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def config_of(folder: Path, number: int) -> dict[str, Any]:
    return yaml.safe_load((folder / f"round-{number}" / "config.yaml").read_text())


def metrics_of(folder: Path, number: int) -> list[dict[str, Any]]:
    lines = (folder / f"round-{number}" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights_of(folder: Path, number: int) -> dict[str, torch.Tensor]:
    (file,) = (folder / f"round-{number}" / "model").glob("*model.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def done(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished rounds of full training."""
    folder = tmp_path_factory.mktemp("rounds") / "run"
    run(policy, folder)
    return folder


def test_each_round_trains_on_answers_of_its_own_start(policy: Path, done: Path) -> None:
    starts = [policy, done / "round-1" / "model"]
    for number, start in enumerate(starts, start=1):
        seed = int(generator("rounds", 0, number).integers(2**31))
        given = build(start).sample(PROMPTS * 3, FEW, seed=seed)
        by_prompt = {p: [a for a in given[i::4] if a] for i, p in enumerate(PROMPTS)}
        rows = rows_of(done, number)
        assert rows
        for row in rows:
            ((turn),) = row["prompt"]
            assert turn["role"] == "user" and row["responses"] == by_prompt[turn["content"]]
            letters = [sum(c.isalpha() for c in text) for text in row["responses"]]
            assert row["scores"] == letters
            assert row["score_chosen"] == max(letters) > min(letters) == row["score_rejected"]
            assert row["chosen"] == row["responses"][letters.index(max(letters))]
    assert rows_of(done, 1) != rows_of(done, 2)


def test_the_reference_is_the_start_of_the_round(done: Path) -> None:
    assert config_of(done, 2)["policy"] == str(done / "round-1" / "model")
    for number in (1, 2):
        first, second = metrics_of(done, number)
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert second["loss"] != first["loss"] and first["rewards/chosen"] == 0


@pytest.mark.slow
def test_the_reference_may_be_the_first_policy(policy: Path, done: Path, tmp_path: Path) -> None:
    run(policy, tmp_path / "first", reference="first")
    again = metrics_of(tmp_path / "first", 1)
    assert again[0]["loss"] == metrics_of(done, 1)[0]["loss"]
    later = metrics_of(tmp_path / "first", 2)[0]
    assert later["rewards/chosen"] != 0 and later["loss"] != pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.slow
def test_finished_rounds_are_not_redone_and_more_may_follow(policy: Path, tmp_path: Path) -> None:
    folder, reward = tmp_path / "run", Letters()
    one = run(policy, folder, reward, rounds=1)
    assert reward.asked == 1
    before = (folder / "round-1" / "result.json").stat().st_mtime_ns
    again = run(policy, folder, reward, rounds=1)
    assert reward.asked == 1 and again.history == one.history
    two = run(policy, folder, reward, rounds=2)
    assert reward.asked == 2 and two.run_dir == folder / "round-2"
    assert (folder / "round-1" / "result.json").stat().st_mtime_ns == before
    assert two.sample(PROMPTS[:1], max_new_tokens=2)


@pytest.mark.slow
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    policy: Path, done: Path, tmp_path: Path
) -> None:
    folder, reward, interrupt = tmp_path / "run", Letters(), [True]

    def loss(scores: Any, *, beta: float) -> torch.Tensor:
        if interrupt[0] and (folder / "round-2").exists():
            raise KeyboardInterrupt
        return PREFERENCE_LOSSES["sigmoid"](scores, beta=beta)

    method = DPO(loss=loss)
    run(policy, folder, reward, method=method, rounds=1)
    reward.fails = True  # while round 2 is labelled
    with pytest.raises(DataError, match="the scorer is away"):
        run(policy, folder, reward, method=method)
    assert not (folder / "answers" / "round-2").exists()
    reward.fails = False
    with pytest.raises(KeyboardInterrupt):  # while round 2 trains
        run(policy, folder, reward, method=method)
    asked, interrupt[0] = reward.asked, False
    run(policy, folder, reward, method=method)
    # Once for each round, and where it failed once more, on the first prompt by itself.
    assert reward.asked == asked == 4
    assert rows_of(folder, 2) == rows_of(done, 2)
    expected = weights_of(done, 2)
    for name, value in weights_of(folder, 2).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
def test_an_adapter_goes_on_from_round_to_round(policy: Path, tmp_path: Path) -> None:
    for reference in ("round", "first"):
        folder = tmp_path / reference
        run(policy, folder, adapter=LoRA(rank=2), reference=reference)
        assert config_of(folder, 2)["policy"] == str(folder / "round-1" / "model")
        resolved = [config_of(folder, number)["resolved"]["reference"] for number in (1, 2)]
        kept = "frozen_adapter" if reference == "round" else "adapter_off"
        assert resolved == ["adapter_off", kept]
        moved = metrics_of(folder, 2)[0]["rewards/chosen"] != 0
        assert moved == (reference == "first")
        assert all("lora" in name for name in weights_of(folder, 2))


@pytest.mark.slow
def test_rankings_and_offsets_take_the_same_answers(policy: Path, tmp_path: Path) -> None:
    for method in (DPO(loss="plackett_luce"), DPO(loss="odpo")):
        folder = tmp_path / str(method.loss)
        run(policy, folder, method=method, rounds=1)
        loss, num = metrics_of(folder, 1)[0]["loss"], len(rows_of(folder, 1))
        assert num == SHORT.batch_size, "the first batch is the whole data"
        if method.loss == "odpo":  # policy = reference: L(-ln of the gap)
            gaps = [row["score_chosen"] - row["score_rejected"] for row in rows_of(folder, 1)]
            values = [math.log1p(gap) for gap in gaps]
        else:
            values = [orders(row["scores"]) for row in rows_of(folder, 1)]
        assert loss == pytest.approx(sum(values) / num, rel=1e-6), method


def orders(scores: list[float]) -> float:
    """Plackett-Luce at equal odds: sum over blocks from the top of ln(left / block)."""
    left, total = len(scores), 0.0
    for score in sorted(set(scores), reverse=True):
        block = scores.count(score)
        total += math.log(left / block)
        left -= block
    return total


@pytest.mark.slow
def test_a_judge_labels_and_its_probabilities_may_be_kept(policy: Path, tmp_path: Path) -> None:
    def judge(prompts: Any, a: Any, b: Any, rows: Any) -> list[float]:
        assert {row["prompt"] for row in rows} == set(prompts)
        return [1 / (1 + math.exp(len(y) - len(x))) for x, y in zip(a, b, strict=True)]

    run(policy, tmp_path / "run", judge=judge, soft_labels=True, rounds=1)
    for row in rows_of(tmp_path / "run", 1):
        gap = len(row["chosen"]) - len(row["rejected"])
        assert gap > 0 and row["p_chosen"] == pytest.approx(1 / (1 + math.exp(-gap)))


@pytest.mark.slow
def test_prompts_are_rows_that_the_reward_sees(policy: Path, tmp_path: Path) -> None:
    seen: list[Any] = []

    def reward(prompts: Any, responses: Any, rows: Any) -> list[float]:
        seen.extend(zip(prompts, [row["truth"] for row in rows], strict=True))
        return [float(len(text)) for text in responses]

    data = [{"question": prompt, "truth": len(prompt)} for prompt in PROMPTS]
    align_rounds(
        policy,
        DPO(),
        data,
        run_dir=tmp_path / "run",
        reward=reward,
        rounds=1,
        samples_per_prompt=3,
        generation=FEW,
        trainer=SHORT,
        data_options=TextOptions(max_length=64, columns={"prompt": "question"}),
    )
    assert set(seen) == {(prompt, len(prompt)) for prompt in PROMPTS}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples_per_prompt": 2}, "samples"),
        ({"seed": 1}, "seed"),
        ({"method": DPO(beta=0.2)}, "method.beta"),
        ({"generation": GenerationOptions(max_new_tokens=5)}, "generation.max_new_tokens"),
        ({"reward": len}, "labelled_by"),
    ],
)
def test_rounds_that_were_asked_for_otherwise(
    change: Any, words: str, policy: Path, done: Path
) -> None:
    with pytest.raises(
        CheckpointError, match=rf"rounds in .* were begun otherwise: {words}: .* before, .* now"
    ):
        run(policy, done, **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"judge": Letters(), "reward": Letters()}, "by a reward or by a judge; got both"),
        ({"reward": None, "judge": None}, "got neither"),
        ({"rounds": 0}, "rounds must be a whole number of at least 1"),
        ({"samples_per_prompt": 1}, "samples_per_prompt must be a whole number of at least 2"),
        ({"soft_labels": True}, "a reward has none"),
        ({"reference": "frozen"}, "'round' or 'first'"),
        ({"reference": "first", "adapter": LoRA(continue_from="x")}, "Merge the adapter"),
        ({"policy": (1, 2)}, "a folder or hub name.*got tuple"),
        ({"method": KTO()}, "KTO reads single labelled ones"),
        ({"method": SFT()}, "SFT reads demonstrations"),
    ],
)
def test_what_cannot_be_asked_for(change: Any, words: str, policy: Path, tmp_path: Path) -> None:
    given = {"policy": policy, "method": DPO(), "reward": Letters(), **change}
    with pytest.raises(ConfigError, match=words):
        align_rounds(prompts=PROMPTS, run_dir=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_a_round_without_a_preference_and_prompts_that_are_none(
    policy: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="nothing to learn from"):
        run(policy, tmp_path / "run", lambda prompts, responses, rows: [1.0] * len(prompts))
    with pytest.raises(DataError, match=r"row 1 has None.*Columns found: question"):
        align_rounds(
            policy, DPO(), [{"prompt": "a"}, {"question": "b"}], run_dir=tmp_path / "x", reward=len
        )


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)
def test_pictures_go_on_in_the_same_way(tmp_path: Path) -> None:
    from tests.image.conftest import make_pipeline

    make_pipeline().save_pretrained(tmp_path / "pipe", safe_serialization=True)

    def bright(prompts: Any, responses: Any, rows: Any) -> list[float]:
        return [sum(image.convert("L").tobytes()) for image in responses]

    result = run(
        tmp_path / "pipe",
        tmp_path / "run",
        bright,
        adapter=LoRA(rank=2),
        generation=GenerationOptions(steps=2),
    )
    folder = tmp_path / "run"
    for number in (1, 2):
        (first, *_) = metrics_of(folder, number)
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
        for row in rows_of(folder, number):
            assert len(row["images"]) == 3 and row["chosen"] in row["images"]
            assert (folder / "answers" / f"round-{number}" / row["chosen"]).is_file()
    second = config_of(folder, 2)
    assert second["policy"] == str(tmp_path / "pipe")
    assert second["adapter"]["continue_from"] == str(folder / "round-1" / "model")
    assert second["resolved"]["reference"] == "frozen_adapter"
    assert result.sample(["a cat"])[0].size == (16, 16)
