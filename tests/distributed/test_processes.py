"""Two real processes train what one trains: text, data-parallel."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from alignkit.reference_store import Table
from tests.distributed.cases import Played, play
from tests.distributed.compare import (
    assert_replicas,
    assert_same_run,
    distance,
    measured,
    saved_weights,
)
from tests.distributed.launch import play_world

pytestmark = pytest.mark.slow

NAMES = (
    *("full", "tied", "lora", "coupled", "singles", "cached", "supervised", "streamed"),
    "online",
)
POISONED = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, alone: Path) -> Path:
    """Everything that two processes do in this file, in one world."""
    root = tmp_path_factory.mktemp("world")
    tasks = [{"do": "collectives", "folder": str(root / "collectives")}]
    tasks += [{"do": "train", "folder": str(root / name), "case": name} for name in NAMES]
    again = {"do": "train", "case": "interrupted", "run_dir": str(root / "interrupted" / "run")}
    tasks += [
        again | {"folder": str(root / "interrupted"), "stop_after": 3},
        {"do": "copy", "folder": str(root / "interrupted" / "run"), "to": str(root / "left")},
        again | {"folder": str(root / "continued")},
        {"do": "copy", "folder": str(alone / "short" / "run"), "to": str(root / "grown" / "run")},
        {"do": "train", "case": "interrupted", "folder": str(root / "grown"), "resume": "must"},
        {"do": "not_finite", "folder": str(root / "not_finite"), "poisoned": POISONED},
    ]
    play_world(tasks, root)
    return root


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alone")
    for name in (*NAMES, "interrupted"):
        play(name, root / name, alone=True)
    play("interrupted", root / "short", alone=True, stop_after=3)
    return root


@pytest.mark.parametrize("rank", [0, 1])
def test_collectives(world: Path, rank: int) -> None:
    told = json.loads((world / "collectives" / f"rank{rank}.json").read_text())
    assert told == {
        "sum": [[3.0, 3.0], [3.0, 3.0]],
        "input": [[rank + 1.0] * 2] * 2,  # a sum leaves what it is given as it was
        "sum of integers": [1, 2],
        "gather": [0, 10, 11, 12, 13],
        "gather rows": [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]],
        "gather nothing": [0],
        "gather empty": [],
        "max": [7, 0, 2**40 + 1],
        "share": {"from": 0, "list": [0, None]},
        "main": rank == 0,
        "size": 2,
    }


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_what_one_trains(world: Path, alone: Path, name: str) -> None:
    """Batches of 5 rows, the last of one row, weights of 0 among them; evaluation included."""
    assert_same_run(Played.read(world / name), Played.read(alone / name))
    assert_replicas(world / name)
    mine, theirs = saved_weights(world / name / "run"), saved_weights(alone / name / "run")
    assert distance(mine, theirs) <= 1e-5


def test_evaluation_is_over_all_rows(world: Path) -> None:
    history = Played.read(world / "full").history
    assert "eval/loss" in history[1] and "eval/rewards/accuracies" in history[3]


def test_one_process_writes_the_run_folder(world: Path, alone: Path) -> None:
    run = world / "full" / "run"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    mine = {str(path.relative_to(run)) for path in run.rglob("*")}
    other = alone / "full" / "run"
    assert mine == {str(path.relative_to(other)) for path in other.rglob("*")}


def test_metrics_between_logged_steps_survive_a_resume(world: Path, alone: Path) -> None:
    """Logged every 4 steps, saved every 2: step 4 reports means of steps from before the resume."""
    assert_replicas(world / "continued")
    mine, theirs = Played.read(world / "continued"), Played.read(alone / "interrupted")
    assert [line["step"] for line in mine.history] == [1, 2, 3, 4]
    for line, other in zip(mine.history, theirs.history, strict=True):
        assert line.keys() == other.keys()
        for key in measured(line):
            assert line[key] == pytest.approx(other[key], rel=1e-5, abs=1e-5), key
    assert distance(mine.weights, theirs.weights) <= 1e-5


def test_one_process_goes_on_with_the_run_of_two(world: Path, alone: Path, tmp_path: Path) -> None:
    run = shutil.copytree(world / "left", tmp_path / "run")
    play("interrupted", tmp_path, alone=True, resume="must", run_dir=run)
    mine, theirs = Played.read(tmp_path), Played.read(alone / "interrupted")
    assert [line["step"] for line in mine.history] == [1, 2, 3, 4]
    assert distance(mine.weights, theirs.weights) <= 1e-5


def test_two_processes_go_on_with_the_run_of_one(world: Path, alone: Path) -> None:
    assert_replicas(world / "grown")
    mine, theirs = Played.read(world / "grown"), Played.read(alone / "interrupted")
    assert [line["step"] for line in mine.history] == [1, 2, 3, 4]
    assert distance(mine.weights, theirs.weights) <= 1e-5


def test_the_pass_of_a_cached_reference_is_shared_out(world: Path, alone: Path) -> None:
    """Both processes computed a part, one of them wrote it all."""
    found = []
    for root in (world, alone):
        tables = [Table() for _ in (root / "cached" / "numbers").glob("[0-9a-f]*/about.json")]
        assert len(tables) == 1
        for shard in (root / "cached" / "numbers").rglob("*.safetensors"):
            arrays = load_file(shard)
            tables[0].add(arrays["keys"], arrays["values"])
            keys = [key.tobytes() for key in arrays["keys"]]
        found.append({key: tables[0].get(key) for key in keys})
    assert found[0] == pytest.approx(found[1], abs=1e-4) and len(found[0]) > 16


def test_a_row_that_is_not_finite_is_named_on_every_process(world: Path) -> None:
    messages = [json.loads((world / "not_finite" / f"rank{r}.json").read_text()) for r in (0, 1)]
    assert messages[0] == messages[1]
    assert f"Rows whose loss is not finite: {POISONED}." in messages[0]
