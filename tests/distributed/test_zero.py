"""DeepSpeed's ZeRO-3 on two real processes: what one process trains, from its checkpoints and to
them. Where deepspeed is not installed, what can be told without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignkit import ConfigError, TrainerOptions
from alignkit.checks.trainer import check_hardware
from alignkit.placed import local, size_of, snapshot, whole_shape
from alignkit.runtime import Runtime
from alignkit.zero import shard_like
from tests.distributed.cases import Played, play
from tests.distributed.compare import assert_replicas, assert_same_run, distance, saved_weights
from tests.distributed.launch import play_world

pytestmark = [
    # peft says that it saves a whole head that carries an adapter, which is what is wanted.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

FULL = ("sharded_full", "sharded_chunked", "sharded_checkpointed", "sharded_coupled")
NAMES = (*FULL, "sharded_tied", "sharded_lora", "sharded_continued", "sharded_supervised")
AVERAGED = "sharded_averaged"
HALF = ("sharded_half", "sharded_half_lora")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed", reason="ZeRO-3 is DeepSpeed's: pip install deepspeed")
    root = tmp_path_factory.mktemp("alone")
    for name in (*NAMES, *HALF, AVERAGED, "sharded_cached"):
        play(name, root / name, alone=True)
    play("sharded_interrupted", root / "left", alone=True, stop_after=2)
    play("sharded_interrupted", root / "whole", alone=True)
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, alone: Path) -> Path:
    root = tmp_path_factory.mktemp("world")
    zero = {"do": "train", "sharding": "zero3"}
    named = (*NAMES, *HALF, AVERAGED, "sharded_cached")
    tasks = [zero | {"folder": str(root / name), "case": name} for name in named]
    half = zero | {"case": "sharded_interrupted"}
    left = alone / "left" / "run" / "checkpoints" / "step-000002"
    tasks += [
        half | {"folder": str(root / "left"), "stop_after": 2},
        half | {"folder": str(root / "continued"), "resume": str(left)},
        {"do": "unreached", "folder": str(root / "unreached")},
    ]
    play_world(tasks, root)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", (*NAMES, AVERAGED, "sharded_cached"))
def test_sharded_processes_train_what_one_trains(world: Path, alone: Path, name: str) -> None:
    """Losses, metrics, each gradient, the weights, the saved model and its answers."""
    assert_same_run(Played.read(world / name), Played.read(alone / name))
    assert_replicas(world / name)
    mine, theirs = saved_weights(world / name / "run"), saved_weights(alone / name / "run")
    assert distance(mine, theirs) <= 1e-5
    for step in ("step-000000.jsonl", "step-000004.jsonl"):
        told, other = (root / name / "run" / "samples" / step for root in (world, alone))
        assert told.read_text() == other.read_text() and len(told.read_text().split()) > 8


@pytest.mark.slow
@pytest.mark.parametrize("name", HALF)
def test_bf16_computes_as_one_process_does(world: Path, alone: Path, name: str) -> None:
    """Masters and gradients are float32; frozen weights of LoRA are stored in bf16."""
    mine, theirs = Played.read(world / name), Played.read(alone / name)
    assert mine.history[0]["rewards/margins"] == 0.0
    assert distance(mine.weights, theirs.weights) <= 1e-3
    for line, other in zip(mine.history, theirs.history, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_sharded(world: Path, name: str) -> None:
    for rank in (0, 1):
        told = Played.read(world / name, rank).local
        assert (told["reference"] is not None) == (name in (*FULL, "sharded_tied"))
        for placement in filter(None, (told["policy"], told["reference"])):
            assert all(sharded for sharded, _, _ in placement.values())
            whole = sum(size for _, size, _ in placement.values())
            here = sum(size for _, _, size in placement.values())
            assert here == pytest.approx(whole / 2, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_the_saved_model_loads(world: Path, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / name / "run" / "model")
    weights = Played.read(world / name).weights
    for key, tensor in model.named_parameters():
        assert torch.equal(tensor, weights[f"policy.model.{key}"]), key


@pytest.mark.slow
def test_the_checkpoint_of_two_goes_on_with_one(world: Path, alone: Path, tmp_path: Path) -> None:
    left = world / "left" / "run" / "checkpoints" / "step-000002"
    play("sharded_interrupted", tmp_path, alone=True, resume=str(left))
    _assert_continued(Played.read(tmp_path), Played.read(alone / "whole"))


@pytest.mark.slow
def test_the_checkpoint_of_one_goes_on_with_two(world: Path, alone: Path) -> None:
    assert_replicas(world / "continued")
    _assert_continued(Played.read(world / "continued"), Played.read(alone / "whole"))


def _assert_continued(mine: Played, theirs: Played) -> None:
    assert [line["step"] for line in mine.history] == [3, 4]
    assert mine.history[-1]["loss"] == pytest.approx(theirs.history[-1]["loss"], abs=1e-5)
    assert distance(mine.weights, theirs.weights) <= 1e-5


@pytest.mark.slow
def test_a_parameter_that_a_step_does_not_reach_has_no_gradient(world: Path) -> None:
    """DeepSpeed keeps a shard's gradient until another one takes its place."""
    for rank in (0, 1):
        told = (world / "unreached" / f"rank{rank}.txt").read_text().split()
        assert float(told[0]) > 0 and float(told[1]) == 0.0


class _Part(torch.nn.Parameter):
    """A parameter as ZeRO-3 leaves it: empty, with its shard beside it."""

    ds_shape = torch.Size((3, 3))

    @property
    def ds_tensor(self) -> torch.Tensor:
        return self.held


def test_shards_are_cut_and_padded_as_deepspeed_does() -> None:
    """Nine elements on two processes are five and four, the last one padded."""
    value = torch.arange(1.0, 10.0).view(3, 3)
    parameter: Any = _Part(torch.empty(0))
    for rank, held in enumerate(([1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0, 0.0])):
        parameter.held = torch.zeros(5)
        with patch("torch.distributed.get_rank", return_value=rank):
            assert shard_like(value, parameter).tolist() == held
    kept = snapshot(parameter)
    assert local(kept).shape == (5,) and whole_shape(kept) == (3, 3) and size_of(parameter) == 9
    local(parameter).fill_(1.0)
    assert parameter.held.sum() == 5.0 and kept.sum() == 0.0


@pytest.mark.parametrize(
    ("changed", "modality", "message"),
    [
        ({"optimizer": "adafactor"}, "text", r"optimizer='adamw' only; got optimizer='adafactor'"),
        ({"compile": True}, "text", r"Write sharding='fsdp2', or leave compile out"),
        ({}, "image", r"sharding='zero3' is for text policies only"),
        ({}, "text", r"pip install 'alignkit\[deepspeed\]', or write sharding='fsdp2'"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    changed: dict[str, Any], modality: str, message: str
) -> None:
    with (
        patch("alignkit.checks.trainer.find_spec", return_value=None),
        pytest.raises(ConfigError, match=message),
    ):
        check_hardware(TrainerOptions(sharding="zero3", **changed), modality)


def test_one_process_and_launchers_of_engines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r'sharding="zero3" shards over processes, and there is'):
        Runtime(sharding="zero3")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"launched with DeepSpeed.*'fsdp2' or 'zero3'"):
        Runtime(sharding="zero3")
