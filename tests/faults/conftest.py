"""Policies and data on disk, and uninterrupted runs of them to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.nursery import Nursery
from tests.faults.runs import WRITERS, arguments, resumed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """diffusers' Euler scheduler meets numpy's new copy keyword; nothing of ours can avoid it."""
    message = "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings(message))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder with `policy` and data of a wing, written once."""
    made: dict[str, Path] = {}

    def folder(wing: str) -> Path:
        if wing not in made:
            made[wing] = tmp_path_factory.mktemp(f"{wing}_inputs")
            WRITERS[wing](made[wing])
        return made[wing]

    return folder


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, inputs: Callable[[str], Path]) -> Path:
    """The run folder of the text run, from beginning to end in one go."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    resumed(**arguments("text", inputs("text"), run_dir))
    return run_dir


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    held = Nursery(tmp_path_factory.mktemp("nursery") / "log.txt")
    yield held
    held.close()
