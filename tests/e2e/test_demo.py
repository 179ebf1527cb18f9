"""The shortened demo, as a user runs it: from an empty folder, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the printed text of `alignkit demo --quick`."""
    here = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, "-m", "alignkit", "demo", "--quick", "--out", "out"],
        cwd=here,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return here / "out", done.stdout


def test_prints_a_table_and_where_the_report_is(demo: tuple[Path, str]) -> None:
    out, printed = demo
    for words in ("win rate", "KL to the reference", "fluency", "denoising error", "peak memory"):
        assert words in printed
    assert printed.rstrip().endswith("report.html")
    assert (out / "report.html").is_file()


@pytest.mark.parametrize("part", ["text", "images"])
def test_each_half_leaves_a_whole_run(demo: tuple[Path, str], part: str) -> None:
    run = demo[0] / part / "run"
    facts = json.loads((run / "result.json").read_text())["facts"]
    assert facts["evaluation"][0]["measure"].startswith("win rate")
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    # Policy = reference before the first update: margin 0 and a loss of ln 2.
    assert first["rewards/margins"] == 0.0
    assert first["loss"] == pytest.approx(0.6931471805599453, abs=1e-7)
    assert (run / "report.html").is_file() and any((run / "model").iterdir())


def test_the_report_needs_nothing_from_elsewhere(demo: tuple[Path, str]) -> None:
    for page in demo[0].rglob("*.html"):
        text = page.read_text()
        assert "<script" not in text
        assert 'src="http' not in text and "src='http" not in text


def test_a_second_demo_replaces_the_first_and_nothing_else(demo: tuple[Path, str]) -> None:
    other = demo[0].parent / "mine"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    done = subprocess.run(
        [sys.executable, "-m", "alignkit", "demo", "--quick", "--out", str(other)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "holds other files" in done.stderr + done.stdout
    assert (other / "precious.txt").read_text() == "mine"
