"""Killed at random moments and started again, a run ends as if nothing had happened.

SIGKILL, to real processes, while they load, train, write checkpoints, answer samples and finish.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.nursery import Nursery
from tests.faults.runs import STEPS, assert_same_folder, random

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

KILLS = 10
POLL = 0.002


@pytest.mark.parametrize(
    ("wing", "pause"),
    [("text", 0.0), ("text", 0.008), ("image", 0.008), ("online", 0.0)],
    ids=["text-training", "text-writing", "image-writing", "online-training"],
)
def test_ten_kills_leave_no_trace(
    wing: str,
    pause: float,
    tmp_path: Path,
    inputs: Callable[[str], Path],
    nursery: Nursery,
) -> None:
    """With a pause around every sync and rename, most kills land within a write."""
    draw = random(STEPS + int(1000 * pause))
    spent = _undisturbed(
        nursery, tmp_path / "one", wing=wing, folder=str(inputs(wing)), pause=pause
    )
    given = {"wing": wing, "folder": str(inputs(wing)), "run_dir": str(tmp_path / "run")}
    kills = 0
    for number in range(KILLS + 2):
        nursery.start(**given, pause=pause)
        metrics = tmp_path / "run" / "metrics.jsonl"
        if number % 4 == 0:  # anywhere from the start on
            time.sleep(draw.uniform(0, spent["start"] + spent["loop"] / 8))
        elif number < KILLS:  # after it has begun to train
            _wait_for_change(nursery, metrics)
            time.sleep(draw.uniform(0, spent["loop"] / 6))
        else:  # after the last step
            _wait_for_lines(nursery, metrics, STEPS)
            time.sleep(draw.uniform(0, 0.7 * spent["finish"]))
        kills += nursery.kill()
    assert kills >= KILLS, f"only {kills} kills found a live run\n{nursery.told()}"
    nursery.start(**given)
    assert nursery.wait() == 0, nursery.told()
    assert_same_folder(tmp_path / "run", tmp_path / "one")


def _undisturbed(nursery: Nursery, run_dir: Path, **given: object) -> dict[str, float]:
    """Run it once; the seconds until it trains, of training, and of finishing."""
    metrics = run_dir / "metrics.jsonl"
    began = time.perf_counter()
    nursery.start(**given, run_dir=str(run_dir))
    _wait_for_lines(nursery, metrics, 1)
    trains = time.perf_counter()
    _wait_for_lines(nursery, metrics, STEPS)
    trained = time.perf_counter()
    assert nursery.wait() == 0, nursery.told()
    ended = time.perf_counter()
    return {"start": trains - began, "loop": trained - trains, "finish": ended - trained}


def _wait_for_lines(nursery: Nursery, path: Path, count: int) -> None:
    while not nursery.done():
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(POLL)


def _wait_for_change(nursery: Nursery, path: Path) -> None:
    before = _state(path)
    while not nursery.done() and _state(path) == before:
        time.sleep(POLL)


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size
