"""FSDP2 on a mesh of two real processes: parameters are sharded, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignkit import DPO, ConfigError
from alignkit.api import build
from tests.builders import pair_rows, text_wing, tiny_lm, tiny_tokenizer
from tests.distributed.cases import SAMPLED, Played, play, questions, trainer
from tests.distributed.compare import assert_replicas, assert_same_run, distance, saved_weights
from tests.distributed.launch import play_world

pytestmark = [
    pytest.mark.slow,
    # peft says that it saves a whole head that carries an adapter, which is what is wanted.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

FULL = (
    *("sharded_full", "sharded_tied", "sharded_chunked", "sharded_checkpointed"),
    "sharded_coupled",
)
COMPARED = (*FULL, "sharded_lora", "sharded_continued")
NAMES = (*COMPARED, "sharded_supervised")
MORE = ("sharded_cached", "sharded_online")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alone")
    for name in (*NAMES, *MORE):
        play(name, root / name, alone=True)
    play("sharded_interrupted", root / "left", alone=True, stop_after=2)
    play("sharded_interrupted", root / "whole", alone=True)
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, alone: Path) -> Path:
    root = tmp_path_factory.mktemp("world")
    named = (*NAMES, *MORE)
    tasks = [{"do": "train", "folder": str(root / name), "case": name} for name in named]
    half = {"do": "train", "case": "sharded_interrupted"}
    left = alone / "left" / "run" / "checkpoints" / "step-000002"
    tasks += [
        half | {"folder": str(root / "left"), "stop_after": 2},
        half | {"folder": str(root / "continued"), "resume": str(left)},
    ]
    tasks.append({"do": "answer", "folder": str(root / "answers")})
    play_world(tasks, root)
    return root


def test_processes_sample_to_prompts_of_their_own(world: Path) -> None:
    """The answers of the whole model, whatever a process has to answer and for how long."""
    wing, asked = text_wing("llama"), questions()
    keys = [(3, 1, place) for place in range(len(asked))]
    whole = wing.generate_tokens(asked, SAMPLED, keys=keys)
    told = [json.loads((world / f"answers/answers-{rank}.json").read_text()) for rank in (0, 1)]
    found = told[0] | told[1]
    assert (len(told[0]), len(told[1])) == (6, 2)
    assert len({len(one.ids) for one in whole}) > 1, "answers that end early"
    assert found == {str(place): [one.ids, one.ended] for place, one in enumerate(whole)}


@pytest.mark.parametrize("name", (*NAMES, *MORE))
def test_sharded_processes_train_what_one_trains(world: Path, alone: Path, name: str) -> None:
    """Losses, metrics, each gradient, and parameters after 4 steps (measured: 2e-8 apart)."""
    assert_same_run(Played.read(world / name), Played.read(alone / name))
    assert_replicas(world / name)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_sharded(world: Path, name: str) -> None:
    for rank in (0, 1):
        local = Played.read(world / name, rank).local
        assert (local["reference"] is not None) == (name in FULL)
        for placement in filter(None, (local["policy"], local["reference"])):
            assert all(sharded for sharded, _, _ in placement.values())
            whole = sum(size for _, size, _ in placement.values())
            here = sum(size for _, _, size in placement.values())
            assert here == pytest.approx(whole / 2, rel=0.01)


@pytest.mark.parametrize("name", COMPARED)
def test_the_reference_equals_the_policy_at_the_start(world: Path, name: str) -> None:
    first = Played.read(world / name).history[0]
    assert first["rewards/margins"] == first["rewards/chosen"] == first["rewards/rejected"] == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_the_saved_model_is_that_of_one_process(world: Path, alone: Path, name: str) -> None:
    mine, theirs = saved_weights(world / name / "run"), saved_weights(alone / name / "run")
    assert distance(mine, theirs) <= 1e-5  # the same names too: tied weights are saved once


@pytest.mark.parametrize("name", FULL)
def test_the_saved_model_loads(world: Path, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / name / "run" / "model")
    weights = Played.read(world / name).weights
    for key, tensor in model.named_parameters():
        assert torch.equal(tensor, weights[f"policy.model.{key}"]), key


@pytest.mark.parametrize("name", NAMES)
def test_sharded_weights_answer_as_whole_ones(world: Path, alone: Path, name: str) -> None:
    for step in ("step-000000.jsonl", "step-000004.jsonl"):
        mine, theirs = (root / name / "run" / "samples" / step for root in (world, alone))
        assert mine.read_text() == theirs.read_text() and len(mine.read_text().split()) > 8


def test_other_optimizers_are_refused() -> None:
    """Adafactor's row and column statistics cannot be kept for shards."""
    given = {"data": pair_rows(4), "trainer": trainer(sharding="fsdp2", optimizer="adafactor")}
    with pytest.raises(ConfigError, match=r"optimizer='adamw' only; got optimizer='adafactor'"):
        build((tiny_lm(), tiny_tokenizer()), DPO(), **given)


def test_one_process_cannot_shard() -> None:
    given = {"data": pair_rows(4), "trainer": trainer(sharding="fsdp2")}
    with pytest.raises(ConfigError, match="shards over processes, and there is one"):
        build((tiny_lm(), tiny_tokenizer()), DPO(), **given)


def test_the_checkpoint_of_two_goes_on_with_one(world: Path, alone: Path, tmp_path: Path) -> None:
    left = world / "left" / "run" / "checkpoints" / "step-000002"
    play("sharded_interrupted", tmp_path, alone=True, resume=str(left))
    mine, theirs = Played.read(tmp_path), Played.read(alone / "whole")
    assert [line["step"] for line in mine.history] == [3, 4]
    assert mine.history[-1]["loss"] == pytest.approx(theirs.history[-1]["loss"], abs=1e-5)
    assert distance(mine.weights, theirs.weights) <= 1e-5


def test_the_checkpoint_of_one_goes_on_with_two(world: Path, alone: Path) -> None:
    assert_replicas(world / "continued")
    mine, theirs = Played.read(world / "continued"), Played.read(alone / "whole")
    assert [line["step"] for line in mine.history] == [3, 4]
    assert mine.history[-1]["loss"] == pytest.approx(theirs.history[-1]["loss"], abs=1e-5)
    assert distance(mine.weights, theirs.weights) <= 1e-5
