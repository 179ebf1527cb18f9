"""Two real processes train what one trains: the image wing.

Timesteps and noise are keyed by a row's place in the global batch. Were they keyed by process or by
micro-batch, the losses would differ in the first digit.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.cases import Played, play
from tests.distributed.compare import assert_replicas, assert_same_run, distance, saved_weights
from tests.distributed.launch import play_world

pytestmark = [
    pytest.mark.slow,
    # diffusers 0.42 gives a tensor to numpy's array functions.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

NAMES = ("image_full", "image_lora")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    play_world([{"do": "train", "folder": str(root / n), "case": n} for n in NAMES], root)
    return root


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_what_one_trains(world: Path, tmp_path: Path, name: str) -> None:
    play(name, tmp_path, alone=True)
    assert_same_run(Played.read(world / name), Played.read(tmp_path), later_gradients=1e-4)
    assert_replicas(world / name)
    assert distance(saved_weights(world / name / "run"), saved_weights(tmp_path / "run")) <= 1e-5
