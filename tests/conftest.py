"""Settings that hold for all tests, one thread and quiet libraries, so that runs repeat; and the
proof ledger."""

from __future__ import annotations

import atexit
import base64
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.ledger import Ledger

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["ALIGNKIT_CACHE"] = tempfile.mkdtemp(prefix="alignkit-tests-")
atexit.register(shutil.rmtree, os.environ["ALIGNKIT_CACHE"], ignore_errors=True)

BLANK = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
"""A picture of one pixel."""


@pytest.fixture(scope="session", autouse=True)
def blank_plots() -> Iterator[Callable[..., bytes]]:
    """Drawing a report's curves takes longer than all else of most tests' tiny runs.

    Returns:
        what draws.
    """
    from alignkit import plots

    drawn = plots._png
    with patch.object(plots, "_png", lambda fill: BLANK):
        yield drawn


@pytest.fixture(scope="module")
def drawn_plots(blank_plots: Callable[..., bytes]) -> Iterator[None]:
    """For tests that are about the pictures."""
    with patch("alignkit.plots._png", blank_plots):
        yield


LEDGER = pytest.StashKey[Ledger]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ledger", metavar="FOLDER", help="write the claims of all proofs there")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEDGER] = Ledger()


@pytest.fixture
def ledger(request: pytest.FixtureRequest) -> Ledger:
    """Where a proof states its claims; a test that takes it is marked `proof`."""
    return request.config.stash[LEDGER]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "ledger" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.proof)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A proof that fails without a failed claim of its own is broken, and the ledger says so."""
    ledger = item.config.stash[LEDGER]
    report: Any = yield
    if report.when == "setup":
        item.stash[FAILED] = ledger.failed
    if report.failed and "proof" in item.keywords and ledger.failed == item.stash[FAILED]:
        ledger.broken.append(item.name)
    return report


FAILED = pytest.StashKey[int]()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    folder, ledger = config.getoption("--ledger"), config.stash[LEDGER]
    if folder is None:
        return
    ledger.write(Path(folder))
    terminalreporter.section("proof ledger")
    terminalreporter.write_line(ledger.table())
    terminalreporter.write_line(f"Written to {folder}/ledger.md and ledger.json.")
