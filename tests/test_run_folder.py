"""The run folder: whole files or none, whatever the moment of the kill, and one run at a time."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from alignkit.errors import CheckpointError, ConfigError
from alignkit.run_folder import (
    RunFolder,
    atomic_folder,
    atomic_write,
    environment,
    heal_folder,
)

# --- single files ---------------------------------------------------------------------------------


def _full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_atomic_write_replaces_and_makes_parents(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "file.txt"
    atomic_write(target, "one")
    atomic_write(target, b"two")
    assert target.read_bytes() == b"two"
    assert os.listdir(target.parent) == ["file.txt"]


@pytest.mark.parametrize("broken", ["os.replace", "os.fsync"])
def test_atomic_write_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    target = tmp_path / "file.txt"
    atomic_write(target, "old")
    monkeypatch.setattr(broken, _full_disk)
    with pytest.raises(CheckpointError, match=r"file\.txt: No space left on device.*Free some"):
        atomic_write(target, "new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


# --- whole folders --------------------------------------------------------------------------------


def _fill(target: Path, generation: int, files: int = 3) -> None:
    with atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        for index in range(files):
            (folder / "sub" / f"{index}.txt").write_text(str(generation))


def _generation(target: Path, files: int = 3) -> int:
    """The generation of a folder that must be whole."""
    texts = [(target / "sub" / f"{index}.txt").read_text() for index in range(files)]
    assert len(set(texts)) == 1 and texts[0], texts
    assert sorted(os.listdir(target)) == ["sub"]
    return int(texts[0])


def test_atomic_folder_replaces(tmp_path: Path) -> None:
    _fill(tmp_path / "a" / "model", 1)
    _fill(tmp_path / "a" / "model", 2)
    assert _generation(tmp_path / "a" / "model") == 2
    assert os.listdir(tmp_path / "a") == ["model"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_exception_inside_leaves_the_old_folder(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "model"
    _fill(target, 1)
    with pytest.raises(type(error)), atomic_folder(target) as folder:
        (folder / "half.txt").write_text("half")
        raise error
    assert _generation(target) == 1
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("fail_at", [1, 2])
def test_a_refused_rename_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    target, calls, real = tmp_path / "model", [0], os.replace
    _fill(target, 1)

    def replace(source: Any, destination: Any) -> None:
        calls[0] += 1
        if calls[0] == fail_at:
            _full_disk()
        real(source, destination)

    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(CheckpointError, match="model: No space left"):
        _fill(target, 2)
    assert _generation(target) == 1
    assert os.listdir(tmp_path) == ["model"]


def test_a_refused_sync_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    _fill(target, 1)
    monkeypatch.setattr("os.fsync", _full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        _fill(target, 2)
    assert _generation(target) == 1
    assert os.listdir(tmp_path) == ["model"]


def test_every_file_is_on_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, replace = os.fsync, os.replace

    def note_sync(handle: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        sync(handle)

    def note_replace(source: Any, destination: Any) -> None:
        events.append("rename")
        replace(source, destination)

    monkeypatch.setattr("os.fsync", note_sync)
    monkeypatch.setattr("os.replace", note_replace)
    _fill(tmp_path / "model", 1)
    before = events[: events.index("rename")]
    assert {"0.txt", "1.txt", "2.txt", "sub"} <= set(before)
    assert events[-1] == tmp_path.name  # and the rename itself


_CRASH_AT = """
import os, shutil, signal, sys
from pathlib import Path
from alignkit.run_folder import atomic_folder
target, point, calls = Path(sys.argv[1]), int(sys.argv[2]), [0]
def crashing(function):
    def call(*args, **kwargs):
        calls[0] += 1
        if calls[0] == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
for name in ("fsync", "replace", "unlink", "rmdir"):
    setattr(os, name, crashing(getattr(os, name)))
shutil.rmtree = crashing(shutil.rmtree)
with atomic_folder(target) as folder:
    (folder / "sub").mkdir()
    (folder / "sub" / "0.txt").write_text("2")
"""


def _run(code: str, *args: object) -> int:
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], timeout=60).returncode


def test_a_crash_at_any_call_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    seen = []
    for point in range(1, 60):
        run_dir = tmp_path / str(point)
        run = RunFolder(run_dir)
        _fill(run.model_dir, 1, files=1)
        code = _run(_CRASH_AT, run.model_dir, point)
        run.lock()  # cleans and heals
        seen.append(_generation(run.model_dir, files=1))
        assert sorted(os.listdir(run_dir)) == [".lock", "model"]
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0 and seen[0] == 1 and seen[-1] == 2
    assert seen == sorted(seen), "once the new folder is in, it stays"
    assert len(seen) >= 7


_WRITE_FOREVER = """
import sys
from pathlib import Path
from alignkit.run_folder import atomic_folder
target, generation = Path(sys.argv[1]), int(sys.argv[2])
while True:
    generation += 1
    with atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        for index in range(3):
            (folder / "sub" / f"{index}.txt").write_text(str(generation))
    print("ready", flush=True)
"""


def test_random_kills_never_leave_a_torn_folder(tmp_path: Path) -> None:
    target, generation, delays = tmp_path / "model", 0, random.Random(0)
    for _ in range(8):
        command = [sys.executable, "-c", _WRITE_FOREVER, str(target), str(generation)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            time.sleep(delays.uniform(0.0, 0.05))
            child.kill()
        later = _generation(heal_folder(target))
        assert later > generation
        generation = later


# --- opening and locking --------------------------------------------------------------------------


def test_opening_creates_and_reopens(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "x")
    assert run.path.is_dir()
    run.append_metrics({"step": 1})
    assert RunFolder(str(run.path)).read_metrics() == [{"step": 1}]
    names = (run.checkpoints, run.model_dir, run.samples_dir, run.plots_dir, run.report_file)
    assert [path.name for path in names] == [
        "checkpoints",
        "model",
        "samples",
        "plots",
        "report.html",
    ]


def test_a_file_or_a_foreign_folder_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="is a file"):
            RunFolder(path)
    with pytest.raises(ConfigError, match=r"other files \(file.*run_dir="):
        RunFolder(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


def test_a_copied_run_without_hidden_files_is_still_a_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "x")
    run.append_metrics({"step": 1})
    run.write_config({"seed": 0})
    (run.path / ".lock").unlink()
    assert RunFolder(run.path).read_config() == {"seed": 0}


def test_a_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        with pytest.raises(CheckpointError, match=r"folder it can write.*run_dir="):
            RunFolder(tmp_path / "x")
    with pytest.raises(CheckpointError, match="folder it can write"):
        RunFolder("/proc/alignkit-run")


_HOLD = """
import sys, time
from alignkit.run_folder import RunFolder
run = RunFolder(sys.argv[1])
run.lock()
print("locked", flush=True)
time.sleep(60)
"""


def test_a_second_run_is_refused_by_the_pid_of_the_first(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "x")
    command = [sys.executable, "-c", _HOLD, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"locked\n"
        leftover = run.path / ".alignkit-tmp-x-00"
        leftover.touch()
        with pytest.raises(CheckpointError, match=rf"in use by a process \(pid {child.pid}\)"):
            run.lock()
        assert leftover.exists(), "only the holder cleans"
        child.kill()
    run.lock()
    assert not leftover.exists()


def test_the_lock_within_one_process(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "x"), RunFolder(tmp_path / "x")
    first.lock()
    first.lock()  # already ours
    with pytest.raises(CheckpointError, match=rf"this very process \(pid {os.getpid()}\)"):
        second.lock()
    first.unlock()
    first.unlock()
    second.lock()
    del second  # a run that nobody holds any more gives its folder back
    first.lock()


def test_locking_cleans_what_killed_runs_left(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "x")
    _fill(run.checkpoints / "step-1", 1)
    os.replace(run.checkpoints / "step-1", run.checkpoints / ".alignkit-old-step-1")
    _fill(run.model_dir, 2)
    (run.path / ".alignkit-old-model").mkdir()
    (run.path / ".alignkit-old-model" / "old.txt").touch()
    (run.checkpoints / ".alignkit-tmp-step-2-abcd" / "sub").mkdir(parents=True)
    (run.path / ".alignkit-tmp-config.yaml-ef01").touch()
    run.lock()
    assert _generation(run.checkpoints / "step-1") == 1
    assert _generation(run.model_dir) == 2
    assert sorted(os.listdir(run.path)) == [".lock", "checkpoints", "model"]
    assert os.listdir(run.checkpoints) == ["step-1"]


# --- config, metrics, result ----------------------------------------------------------------------


def test_config_round_trip(tmp_path: Path) -> None:
    import numpy as np

    run = RunFolder(tmp_path)
    assert run.read_config() is None
    given = {"z": 1, "a": {"rate": np.float32(0.5), "names": ("x", "ü")}, "path": Path("d/e")}
    run.write_config({**given, "small": 1e-5, "none": None, "on": True})
    read = run.read_config()
    assert read == {
        "z": 1,
        "a": {"rate": 0.5, "names": ["x", "ü"]},
        "path": "d/e",
        "small": 1e-5,
        "none": None,
        "on": True,
    }
    assert list(read)[:2] == ["z", "a"]
    with pytest.raises(ConfigError, match=r"config\.method\.loss.*function"):
        run.write_config({"method": {"loss": lambda scores: scores}})
    assert run.read_config() == read


def test_damaged_config_is_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for text in ("a: [1", "- 1\n- 2"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.yaml cannot be read"):
            run.read_config()


def _no_constants(name: str) -> None:
    raise AssertionError(f"not strict JSON: {name}")


def test_metrics_are_strict_json(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.append_metrics({"step": 1, "loss": float("nan"), "x": {"y": [float("inf"), 1.5]}})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=_no_constants) == {
        "step": 1,
        "loss": None,
        "x": {"y": [None, 1.5]},
    }
    assert line.endswith("\n") and line.count("\n") == 1


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_half_a_last_line_is_dropped_and_never_extended(tmp_path: Path, cut: int) -> None:
    run = RunFolder(tmp_path)
    for step in (1, 2):
        run.append_metrics({"step": step})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    again = RunFolder(tmp_path)
    kept = again.read_metrics()
    assert kept[:1] == [{"step": 1}]
    assert len(kept) == (2 if cut == 1 else 1)  # without its line end a whole record is still whole
    again.append_metrics({"step": 3})
    assert again.read_metrics() == [*kept, {"step": 3}]


def test_damage_elsewhere_in_the_metrics_is_not_passed_over(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    path = tmp_path / "metrics.jsonl"
    for damage in (b'{"step": 1}\n{"st\n{"step": 3}\n', b'{"step": 1}\n[2]\n'):
        path.write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl.*line 2"):
            run.read_metrics()


def test_a_failed_append_does_not_spoil_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    run.append_metrics({"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", _half_write(open))
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: No space left"):
            run.append_metrics({"step": 2})
    run.append_metrics({"step": 3})
    assert run.read_metrics() == [{"step": 1}, {"step": 3}]


def _half_write(real: Callable[..., Any]) -> Callable[..., Any]:
    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "ab":
            with real(path, mode) as file:
                file.write(b'{"st')
            _full_disk()
        return real(path, mode, *args, **kwargs)

    return opened


def test_cut_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    for step in range(1, 6):
        run.append_metrics({"step": step, "loss": 1 / step})
    before = run.read_metrics()
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", _full_disk)
        with pytest.raises(CheckpointError):
            run.cut_metrics(3)
    assert run.read_metrics() == before
    assert run.cut_metrics(3) == before[:3] == run.read_metrics()
    run.append_metrics({"step": 4})
    assert len(run.read_metrics()) == 4


def test_result_marks_the_end(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_result() is None
    run.write_result({"steps": 3, "loss": float("nan")})
    assert run.read_result() == {"steps": 3, "loss": None}
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"result\.json cannot be read"):
        run.read_result()


# --- samples --------------------------------------------------------------------------------------


def test_text_samples_round_trip(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_samples() == {}
    answers = ["two\nlines\u2028more", "", "ü \ud83d half a letter"]
    path = run.write_samples(10, ["a", "b", "a"], answers)
    assert path == tmp_path / "samples" / "step-000010.jsonl"
    run.write_samples(0, ["a"], ["x"])
    found = run.read_samples()
    assert list(found) == [0, 10]
    assert found[10].prompts == ("a", "b", "a")
    assert found[10].answers == tuple(answers)
    assert not found[10].pictures


def test_picture_samples_round_trip_and_replace(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for color in ("red", "blue"):
        path = run.write_samples(5, ["p", "q"], [Image.new("RGB", (4, 4), color)] * 2)
    assert sorted(os.listdir(path)) == ["000.png", "001.png", "prompts.json"]
    assert os.listdir(run.samples_dir) == ["step-000005"]
    samples = run.read_samples()[5]
    assert samples.pictures and samples.prompts == ("p", "q")
    with Image.open(samples.answers[1]) as picture:
        assert picture.getpixel((0, 0)) == (0, 0, 255)


def test_samples_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="2 prompts and 1 answers"):
        run.write_samples(1, ["a", "b"], ["x"])
    path = run.write_samples(1, ["p"], [Image.new("RGB", (2, 2))])
    (path / "000.png").unlink()
    with pytest.raises(CheckpointError, match="step-000001 cannot be read"):
        run.read_samples()


# --- environment ----------------------------------------------------------------------------------


def _git(folder: Path, *args: str) -> None:
    names = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *names, *args], cwd=folder, check=True, capture_output=True)


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = environment()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"] and found["platform"]
    assert {"alignkit", "transformers", "diffusers", "peft", "accelerate", "datasets"} <= set(found)
    assert found["git"] is None
    _git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    _git(tmp_path, "add", "file")
    _git(tmp_path, "commit", "-qm", "first")
    revision = environment()["git"]
    assert revision is not None and len(revision) == 40
    (tmp_path / "file").write_text("2")
    assert environment()["git"] == f"{revision}-dirty"


def test_import_is_light() -> None:
    code = "import sys, alignkit.run_folder; sys.exit('torch' in sys.modules)"
    assert _run(code) == 0
