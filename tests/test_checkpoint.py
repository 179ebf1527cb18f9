"""Checkpoints: whole or not at all, and a run that goes on from one as if nothing had happened."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignkit import DPO, AlignResult, GenerationOptions, LoRA, TrainerOptions, align, build
from alignkit import checkpoint as ck
from alignkit.errors import CheckpointError, ConfigError
from alignkit.text.wing import build as build_text
from tests.builders import move, pair_rows, tiny_lm, tiny_tokenizer

STATE: dict[str, Any] = {
    "numbers": {"int": 3, "float": 0.1, "big": 2**60, "none": None, "yes": True, "inf": math.inf},
    "text": "ä\n\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    "list": [1, [2.5, "x"], {"deep": torch.arange(3)}],
    "tensors": {
        "float32": torch.tensor([0.1, -0.0, math.nan, math.inf]),
        "float64": torch.tensor([1 / 3]).double(),
        "bfloat16": torch.tensor([0.1, 3e38]).bfloat16(),
        "int64": torch.tensor([2**60]),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 3),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "dots.and/slashes": torch.ones(1),
    },
}


def assert_same(found: Any, expected: Any, where: str = "state") -> None:
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape, where
        raw = [t.contiguous().flatten().view(torch.uint8) for t in (found, expected) if t.dim()]
        assert not raw or torch.equal(*raw), where
        assert expected.dim() or found.item() == expected.item(), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, value in enumerate(expected):
            assert_same(found[place], value, f"{where}[{place}]")
    else:
        assert found == expected and type(found) is type(expected), where


def test_a_nested_state_comes_back_bitwise(tmp_path) -> None:
    ck.save(tmp_path / "step-1", STATE)
    assert_same(ck.load(tmp_path / "step-1"), STATE)


def test_tensors_that_share_memory_come_back_apart(tmp_path) -> None:
    whole = torch.arange(4.0)
    ck.save(tmp_path / "step-1", {"whole": whole, "again": whole, "part": whole[1:3]})
    assert_same(ck.load(tmp_path / "step-1"), {"whole": whole, "again": whole, "part": whole[1:3]})


def three(folder: Path) -> list[Path]:
    """Checkpoints of steps 2, 10 and 9, written in this order."""
    made = [ck.folder_of(folder, step) for step in (2, 10, 9)]
    for path in made:
        ck.save(path, {"step": ck.step_of(path), "tensor": torch.arange(50.0)})
    return made


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


DAMAGE = {
    "flipped state": lambda folder: flip(folder / ck.STATE),
    "flipped tensors": lambda folder: flip(folder / ck.TENSORS),
    "flipped manifest": lambda folder: flip(folder / ck.MANIFEST),
    "manifest of another form": lambda folder: (folder / ck.MANIFEST).write_text("[]"),
    "no manifest": lambda folder: (folder / ck.MANIFEST).unlink(),
    "no state": lambda folder: (folder / ck.STATE).unlink(),
    "no tensors": lambda folder: (folder / ck.TENSORS).unlink(),
    "cut tensors": lambda folder: (folder / ck.TENSORS).write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning_that_names_it(
    damage, tmp_path, caplog
) -> None:
    three(tmp_path)
    broken = ck.folder_of(tmp_path, 10)
    DAMAGE[damage](broken)
    with pytest.raises(CheckpointError, match=str(broken)):
        ck.load(broken)
    with caplog.at_level(logging.WARNING, "alignkit"):
        assert ck.newest(tmp_path) == ck.folder_of(tmp_path, 9)
    assert str(broken) in caplog.text


def test_the_newest_is_by_step_and_not_by_time_or_name(tmp_path) -> None:
    assert ck.newest(tmp_path / "nowhere") is None
    three(tmp_path)
    assert ck.newest(tmp_path) == ck.folder_of(tmp_path, 10)
    assert ck.load(ck.newest(tmp_path))["step"] == 10
    for path in (tmp_path / "step-7000000", tmp_path / "step-final"):
        path.mkdir()
    (tmp_path / "step-11").touch()
    assert ck.newest(tmp_path) == ck.folder_of(tmp_path, 10)


def test_pruning_keeps_the_newest_and_the_spare_one(tmp_path) -> None:
    made = three(tmp_path)
    (tmp_path / "notes").mkdir()
    ck.prune(tmp_path, keep=1, spare=made[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step-000002", "step-000010"]
    ck.prune(tmp_path, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step-000010"]


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch) -> None:
    (path, *_) = three(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ck, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        ck.save(path, {"step": 99})
    assert ck.load(path)["step"] == 2 and len(list(tmp_path.iterdir())) == 3


def test_the_fingerprint_knows_names_shapes_and_values() -> None:
    plain = nn.Linear(3, 2)
    same, moved = nn.Linear(3, 2), nn.Linear(3, 2)
    for other in (same, moved):
        other.load_state_dict(plain.state_dict())
    with torch.no_grad():
        moved.bias[-1] += 1e-6
    assert ck.fingerprint(same) == ck.fingerprint(plain) != ck.fingerprint(moved)
    assert ck.fingerprint(nn.Sequential(plain)) != ck.fingerprint(plain)
    assert ck.fingerprint(plain.bfloat16()) != ck.fingerprint(same)


# ---- runs that go on


OPTIONS: dict[str, Any] = {
    "max_steps": 5,
    "batch_size": 3,
    "learning_rate": 1e-2,
    "log_every": 2,
    "save_every": 1,
    "weight_decay": 0.1,
    "schedule": "cosine",
}
QUIET = GenerationOptions(max_new_tokens=2)


def arguments(kind: str, run_dir: Path, adapter_dir: Path | None = None, **more: Any) -> Any:
    """What a run is told; the policy is made afresh each time, as by another process."""
    adapter = None
    if kind == "lora":
        adapter = LoRA(rank=4)
    elif kind == "continued":
        adapter = LoRA(continue_from=str(adapter_dir))
    trainer = TrainerOptions(**{**OPTIONS, **more.pop("options", {})})
    method = more.pop("method", DPO())
    policy = more.pop("policy", None) or (tiny_lm("llama"), tiny_tokenizer())
    given = {"adapter": adapter, "trainer": trainer, "run_dir": run_dir, "generation": QUIET}
    return (policy, method, more.pop("data", None) or pair_rows(8)), {**given, **more}


def run_to_end(*args: Any, **more: Any) -> Any:
    """A run whose steps are all done; nothing is written after the last one."""
    positional, named = arguments(*args, **more)
    run = build(*positional, **named)
    for _ in run.steps():
        pass
    run.folder.unlock()
    return run


def finish(*args: Any, **more: Any) -> AlignResult:
    positional, named = arguments(*args, **more)
    return align(*positional, **named)


def interrupt(steps: int, *args: Any, **more: Any) -> None:
    """A run that dies after `steps` steps."""
    positional, named = arguments(*args, **more)
    run = build(*positional, **named)
    for record in run.steps():
        if record.step == steps:
            break
    run.folder.unlock()


def without_seconds(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in history]


def trained(run: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in run.wing.policy.named_parameters()}


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    wing = build_text((tiny_lm("llama"), tiny_tokenizer()), adapter=LoRA(rank=4))
    move(wing.backend.module)
    wing.save(folder)
    return folder


@pytest.mark.parametrize("kind", ["full", "lora", "continued"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_one_bitwise(kind, steps, tmp_path, adapter_dir) -> None:
    whole = run_to_end(kind, tmp_path / "whole", adapter_dir)
    interrupt(steps, kind, tmp_path / "parts", adapter_dir)
    again = run_to_end(kind, tmp_path / "parts", adapter_dir)
    assert [line["step"] for line in again.history] == [1, 2, 3, 4, 5]
    assert without_seconds(again.history) == without_seconds(whole.history)
    expected = trained(whole)
    assert trained(again).keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in trained(again).items())
    assert again.metrics == whole.metrics


def test_work_after_the_last_checkpoint_is_done_again_and_told_once(tmp_path) -> None:
    whole = run_to_end("full", tmp_path / "whole", options={"save_every": 2})
    interrupt(3, "full", tmp_path / "parts", options={"save_every": 2})
    again = run_to_end("full", tmp_path / "parts", options={"save_every": 2})
    assert without_seconds(again.history) == without_seconds(whole.history)


def test_a_damaged_newest_checkpoint_costs_one_save_and_nothing_else(
    tmp_path, caplog, capsys
) -> None:
    whole = run_to_end("lora", tmp_path / "whole")
    interrupt(3, "lora", tmp_path / "parts")
    flip(ck.folder_of(tmp_path / "parts" / "checkpoints", 3) / ck.TENSORS)
    with caplog.at_level(logging.INFO, "alignkit"):
        again = run_to_end("lora", tmp_path / "parts")
    assert "step-000003" in caplog.text and "Resumed from" in capsys.readouterr().err
    assert without_seconds(again.history) == without_seconds(whole.history)


def test_a_changed_configuration_is_refused_naming_the_keys(tmp_path) -> None:
    interrupt(1, "full", tmp_path / "run")
    changed = {"method": DPO(beta=0.5), "options": {"learning_rate": 1e-3}, "seed": 3}
    with pytest.raises(CheckpointError) as error:
        run_to_end("full", tmp_path / "run", **changed)
    for key in ("method.beta", "trainer.learning_rate", "seed"):
        assert key in str(error.value)
    assert "batch_size" not in str(error.value)


def test_resume_must_and_never_and_a_path(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="found no run"):
        run_to_end("full", tmp_path / "none", resume="must")
    whole = run_to_end("full", tmp_path / "whole", options={"keep_checkpoints": 9})
    interrupt(3, "full", tmp_path / "parts", options={"keep_checkpoints": 9})
    again = run_to_end("full", tmp_path / "parts", resume="must", options={"keep_checkpoints": 9})
    assert without_seconds(again.history) == without_seconds(whole.history)
    path = ck.folder_of(tmp_path / "whole" / "checkpoints", 2)
    back = run_to_end("full", tmp_path / "whole", resume=path, options={"keep_checkpoints": 9})
    assert without_seconds(back.history) == without_seconds(whole.history)
    positional, named = arguments("full", tmp_path / "parts", resume="never")
    run = build(*positional, **named)
    assert run.trainer.step == 0 and not list((tmp_path / "parts").glob("checkpoints/*"))
    run.folder.unlock()
    with pytest.raises(ConfigError, match="resume"):
        run_to_end("full", tmp_path / "parts", resume=tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_finished_run_is_returned_as_it_is(kind, tmp_path) -> None:
    short = {"max_steps": 2}
    first = finish(kind, tmp_path, options=short)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "model").iterdir()}
    again = finish(kind, tmp_path, options=short)
    assert again.history == first.history and again.report == first.report
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "model").iterdir()} == files
    assert again.metrics == first.metrics
    prompt = ["What is the sky?"]
    assert again.sample(prompt, max_new_tokens=8) == first.sample(prompt, max_new_tokens=8)


def test_other_weights_than_at_the_start_are_refused(tmp_path) -> None:
    interrupt(2, "full", tmp_path)
    model = tiny_lm("llama")
    move(model)
    with pytest.raises(CheckpointError, match="began with other weights"):
        run_to_end("full", tmp_path, policy=(model, tiny_tokenizer()))
    assert len(run_to_end("full", tmp_path).history) == 5, "the folder was left locked or changed"


def test_other_data_than_at_the_start_is_refused(tmp_path) -> None:
    interrupt(2, "full", tmp_path)
    with pytest.raises(CheckpointError, match=r"data|rows"):
        run_to_end("full", tmp_path, data=pair_rows(7))
