"""Interrupted runs whose newest checkpoint is damaged, or who have none yet."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit import CheckpointError, EarlyStop
from tests.faults.runs import (
    STEPS,
    abandon,
    arguments,
    assert_same_folder,
    checkpoints,
    lines_of,
    options,
    resumed,
    weights_bytes,
)

pytestmark = pytest.mark.slow

LEFT_AT = 20
"""Checkpoints of every third step: 15 and 18 are there; so may be one of the best evaluation."""


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory, inputs: Callable[[str], Path]) -> Path:
    """The run folder of a run that was interrupted after step 20."""
    run_dir = tmp_path_factory.mktemp("left") / "run"
    abandon(LEFT_AT, **arguments("text", inputs("text"), run_dir))
    return run_dir


def _truncate(folder: Path) -> None:
    file = folder / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _flip(folder: Path) -> None:
    raw = bytearray((folder / "tensors.safetensors").read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / "tensors.safetensors").write_bytes(raw)


def _flip_state(folder: Path) -> None:
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text.replace('"step": ', '"step": 1', 1))


def _no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _half_a_manifest(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_text(file.read_text()[:20])


def _list_as_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def _empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


DAMAGES = (
    _truncate,
    _flip,
    _flip_state,
    _no_manifest,
    _half_a_manifest,
    _list_as_manifest,
    _empty,
)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_a_damaged_checkpoint_is_passed_over(
    damage: Callable[[Path], None],
    left: Path,
    undisturbed: Path,
    inputs: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = shutil.copytree(left, tmp_path / "run")
    newest = run_dir / "checkpoints" / checkpoints(run_dir)[-1]
    damage(newest)
    with caplog.at_level(logging.INFO, "alignkit"):
        resumed(**arguments("text", inputs("text"), run_dir))
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any(str(newest) in message for message in warned)
    before = run_dir / "checkpoints" / checkpoints(left)[-2]
    assert f"Resumed from {before}." in capsys.readouterr().err
    assert_same_folder(run_dir, undisturbed)


def test_all_checkpoints_damaged(
    left: Path, undisturbed: Path, inputs: Callable[[str], Path], tmp_path: Path
) -> None:
    """`must` refuses and leaves everything as it is; `auto` starts anew."""
    run_dir = shutil.copytree(left, tmp_path / "run")
    for name in checkpoints(run_dir):
        _flip(run_dir / "checkpoints" / name)
    given = arguments("text", inputs("text"), run_dir)
    with pytest.raises(CheckpointError, match='resume="must"'):
        resumed(**given, resume="must")
    assert lines_of(run_dir) == lines_of(left)
    resumed(**given)
    assert_same_folder(run_dir, undisturbed)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_interrupted_before_the_first_checkpoint(
    after: int, undisturbed: Path, inputs: Callable[[str], Path], tmp_path: Path
) -> None:
    """It starts anew: no metric is there twice, no sample of the first attempt stays."""
    run_dir = tmp_path / "run"
    given = arguments("text", inputs("text"), run_dir)
    abandon(after, **given)
    assert not (run_dir / "checkpoints").exists()
    resumed(**given)
    assert_same_folder(run_dir, undisturbed)


def test_half_a_line_of_metrics(
    left: Path, undisturbed: Path, inputs: Callable[[str], Path], tmp_path: Path
) -> None:
    run_dir = shutil.copytree(left, tmp_path / "run")
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "lo')
    resumed(**arguments("text", inputs("text"), run_dir))
    assert_same_folder(run_dir, undisturbed)


def test_the_checkpoint_of_the_best_step_lacks_nothing(
    undisturbed: Path, inputs: Callable[[str], Path], tmp_path: Path
) -> None:
    """Killed right after the best evaluation was kept: its line of metrics is not lost."""
    run_dir = tmp_path / "run"
    given = arguments("text", inputs("text"), run_dir)
    abandon(5, **given)
    assert checkpoints(run_dir) == ["step-000003", "step-000005"]
    resumed(**given, resume="must")
    assert_same_folder(run_dir, undisturbed)


def test_an_early_stop_stays_where_it_stopped(
    inputs: Callable[[str], Path], tmp_path: Path
) -> None:
    """Interrupted between its last step and its end, it takes no step more."""
    stop = EarlyStop(metric="eval/loss", mode="max", patience=2)  # the loss falls: stops soon
    given = arguments("text", inputs("text"), tmp_path / "one")
    given["trainer"] = options(early_stop=stop, eval_every=3)
    whole = resumed(**given)
    steps = len(whole.history)
    assert steps == 9
    given["run_dir"] = tmp_path / "run"
    abandon(steps, **given)
    assert len(resumed(**given, resume="must").history) == steps
    assert_same_folder(tmp_path / "run", tmp_path / "one")


def test_a_finished_run_taken_up_again_is_not_finished(
    undisturbed: Path, inputs: Callable[[str], Path], tmp_path: Path
) -> None:
    """Resumed by path from within, and interrupted: `auto` must not take it for finished."""
    run_dir = shutil.copytree(undisturbed, tmp_path / "run")
    given = arguments("text", inputs("text"), run_dir)
    path = run_dir / "checkpoints" / checkpoints(run_dir)[0]
    abandon(int(path.name[-3:]) + 1, **given, resume=str(path))
    assert not (run_dir / "result.json").exists()
    resumed(**given)
    assert_same_folder(run_dir, undisturbed)


def test_a_finished_run_is_returned_as_it_is(
    undisturbed: Path, inputs: Callable[[str], Path]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    result = resumed(**arguments("text", inputs("text"), undisturbed))
    assert [line["step"] for line in result.history] == list(range(1, STEPS + 1))
    after = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    lock = undisturbed / ".lock"
    assert before.pop(lock) and after.pop(lock)
    assert before == after


def test_start_anew_on_top_of_a_finished_run(
    undisturbed: Path, inputs: Callable[[str], Path], tmp_path: Path
) -> None:
    """`never` clears what was there, but only when nothing is wrong with what was given."""
    run_dir = shutil.copytree(undisturbed, tmp_path / "run")
    given = arguments("text", inputs("text"), run_dir)
    with pytest.raises(ValueError, match=r"no file or folder"):
        resumed(**(given | {"data": str(tmp_path / "missing.jsonl")}), resume="never")
    assert_same_folder(run_dir, undisturbed)
    assert json.loads((run_dir / "result.json").read_text())["steps"] == STEPS
    resumed(**(given | {"seed": 1}), resume="never")
    assert weights_bytes(run_dir) != weights_bytes(undisturbed)
    assert lines_of(run_dir) != lines_of(undisturbed)
