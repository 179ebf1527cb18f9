"""Run folders that are in use, read-only or full."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alignkit import CheckpointError, ConfigError
from alignkit.api import build
from tests.faults.nursery import Nursery
from tests.faults.runs import (
    abandon,
    arguments,
    assert_same_folder,
    checkpoints,
    lines_of,
    options,
    resumed,
)

Inputs = Callable[[str], Path]
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@pytest.mark.slow
def test_a_second_run_is_refused_by_the_pid_of_the_first(
    inputs: Inputs, undisturbed: Path, tmp_path: Path, nursery: Nursery
) -> None:
    """Another process holds the folder; after its death this one goes on where it was."""
    run_dir = tmp_path / "run"
    pid = nursery.start(wing="text", folder=str(inputs("text")), run_dir=str(run_dir), pause=0.02)
    while not nursery.done() and not list(run_dir.glob("checkpoints/step-*")):
        time.sleep(0.005)
    given = arguments("text", inputs("text"), run_dir)
    for resume in ("auto", "never"):
        with pytest.raises(CheckpointError, match=rf"in use by a process \(pid {pid}\)"):
            resumed(**given, resume=resume)
    assert nursery.kill()
    resumed(**given, resume="must")
    assert_same_folder(run_dir, undisturbed)


def test_a_second_run_in_the_same_process(inputs: Inputs, tmp_path: Path) -> None:
    given = arguments("text", inputs("text"), tmp_path / "run", trainer=options(max_steps=2))
    policy, method, data = (given.pop(name) for name in ("policy", "method", "data"))
    run = build(policy, method, data, **given)
    with pytest.raises(CheckpointError, match=f"this very process .pid {os.getpid()}"):
        build(policy, method, data, **given)
    for _ in run.steps():
        pass
    run.finish()
    assert len(build(policy, method, data, **given).finish().history) == 2  # free again


def test_a_file_in_the_way(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match="run_dir must be a folder"):
            resumed(**arguments("text", inputs("text"), place))
    assert (tmp_path / "file").read_text() == "mine"


@linux
def test_a_place_where_nothing_can_be_made(inputs: Inputs) -> None:
    """Not even by root."""
    with pytest.raises(CheckpointError, match="A run needs a folder it can write; /proc/self/run"):
        resumed(**arguments("text", inputs("text"), Path("/proc/self/run")))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own, in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def _remount(place: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(place)], check=True)


@pytest.mark.slow
def test_a_read_only_file_system(
    disk: Path, inputs: Inputs, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = disk / "run"
    given = arguments("text", inputs("text"), run_dir)
    abandon(7, **given)
    left = sorted(path.name for path in run_dir.rglob("*"))
    _remount(disk, "ro")
    try:
        with pytest.raises(CheckpointError, match="A run needs a folder it can write"):
            resumed(**given)
        with pytest.raises(CheckpointError, match="A run needs a folder it can write"):
            resumed(**(given | {"run_dir": disk / "new"}))
    finally:
        _remount(disk, "rw")
    assert sorted(path.name for path in run_dir.rglob("*")) == left
    resumed(**given)
    assert_same_folder(run_dir, undisturbed)


class Ballast:
    """Fills a file system to the last byte."""

    def __init__(self, place: Path) -> None:
        self.file = place / "ballast"

    def fill(self, leave: int = 0) -> None:
        with open(self.file, "ab", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 4096)
            except OSError as error:
                assert error.errno == errno.ENOSPC
            file.truncate(max(0, file.tell() - leave))

    def remove(self) -> None:
        self.file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("leave", [0, 100_000, 400_000])
def test_a_full_disk(
    leave: int, disk: Path, inputs: Inputs, undisturbed: Path, tmp_path: Path
) -> None:
    """Full at once, in the middle of a checkpoint's tensors, or with the next one."""
    run_dir = disk / "run"
    given = arguments("text", inputs("text"), run_dir)
    policy, method, data = (given.pop(name) for name in ("policy", "method", "data"))
    ballast = Ballast(disk)
    run = build(policy, method, data, **given)
    with pytest.raises(CheckpointError, match=r"No space left on device.*[Ff]ree some space"):
        for record in run.steps():
            if record.step == 7:
                ballast.fill(leave)
    whole = checkpoints(run_dir)
    assert whole[0] == "step-000005" or whole[0] == "step-000006"
    assert not list(run_dir.rglob("*.alignkit*"))
    ballast.remove()
    result = resumed(policy=policy, method=method, data=data, **given, resume="must")
    assert len(result.history) == len(lines_of(undisturbed))
    assert_same_folder(run_dir, undisturbed)


@pytest.mark.slow
def test_a_full_disk_at_the_end(
    disk: Path, inputs: Inputs, undisturbed: Path, tmp_path: Path
) -> None:
    """The model does not fit: no half of it stays, and the run can be finished later."""
    run_dir = disk / "run"
    given = arguments("text", inputs("text"), run_dir)
    policy, method, data = (given.pop(name) for name in ("policy", "method", "data"))
    run = build(policy, method, data, **given)
    for _ in run.steps():
        pass
    ballast = Ballast(disk)
    ballast.fill(leave=60_000)
    with pytest.raises(CheckpointError, match="No space left on device"):
        run.finish()
    assert not (run_dir / "model").exists() and not (run_dir / "result.json").exists()
    ballast.remove()
    resumed(policy=policy, method=method, data=data, **given)
    assert_same_folder(run_dir, undisturbed)


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_write_that_is_refused(
    name: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without a file system of its own: the third checkpoint meets a full disk."""
    run_dir = tmp_path / "run"
    given = arguments("text", inputs("text"), run_dir, trainer=options(max_steps=9, save_every=2))
    given.pop("eval_data")
    policy, method, data = (given.pop(key) for key in ("policy", "method", "data"))
    run = build(policy, method, data, **given)

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CheckpointError, match=r"Could not write .*step-000006: No space left"):
        for record in run.steps():
            if record.step == 5:
                monkeypatch.setattr(os, name, refuse)
    monkeypatch.undo()
    assert checkpoints(run_dir) == ["step-000002", "step-000004"]
    result = resumed(policy=policy, method=method, data=data, **given, resume="must")
    assert [line["step"] for line in result.history] == list(range(1, 10))
    assert not list(run_dir.rglob("*.alignkit*"))
