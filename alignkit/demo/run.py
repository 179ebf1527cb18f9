"""`alignkit demo`: both shipped models aligned on a CPU, measured, and reported."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from alignkit.demo.images import ImageDemo, run_images
from alignkit.demo.text import TextDemo, run_text
from alignkit.errors import ConfigError
from alignkit.facts import EvaluationRow, ReportFacts, duration, memory
from alignkit.report import summary_table, write_index, write_report
from alignkit.result import AlignResult
from alignkit.run_folder import RunFolder
from alignkit.runtime import Runtime

QUICK = (
    TextDemo(pairs=200, steps=6, prompts=24),
    ImageDemo(pairs=48, steps=4, prompts=8),
)


def main(out: str | Path = "runs/demo", *, quick: bool = False) -> Path:
    """Align both shipped models, print what came of it, and return the path of the report.

    Args:
        out: the folder to work in; a demo's earlier one is replaced.
        quick: fewer steps and prompts: shows that everything runs, not how well it learns.
    """
    out = Path(out)
    _make_room(out)
    text, images = QUICK if quick else (TextDemo(), ImageDemo())
    began = time.perf_counter()
    print("1/2  a chat LLM by DPO", flush=True)
    parts = [_with_rows(*run_text(out / "text", text))]
    print("2/2  an SDXL pipeline by Diffusion-DPO", flush=True)
    parts.append(_with_rows(*run_images(out / "images", images)))
    report = write_index(out / "report.html", parts, title="alignkit demo")
    print()
    for facts in parts:
        print(summary_table(facts), end="\n\n")
    seconds, peak = time.perf_counter() - began, Runtime().peak_memory()
    print(f"Both together: {duration(seconds)}, peak memory {memory(peak)}")
    print(f"Report: {report}")
    return report


_MARK = ".alignkit-demo"


def _make_room(out: Path) -> None:
    """Remove an earlier demo's folder, and nobody else's."""
    if out.exists() and any(out.iterdir()):
        if not (out / _MARK).exists():
            raise ConfigError(
                f"The demo writes to a folder of its own, and {out} holds other files. Name an "
                "empty "
                "or new one with --out."
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()


def _with_rows(result: AlignResult, rows: Sequence[EvaluationRow]) -> ReportFacts:
    """The run's facts and report with the demo's own measurements at the top."""
    assert result.run_dir is not None
    folder = RunFolder(result.run_dir)
    stored = folder.read_result() or {}
    facts = replace(ReportFacts.from_dict(stored["facts"]), evaluation=tuple(rows))
    folder.write_result({**stored, "facts": facts.as_dict()})
    write_report(folder, facts)
    return facts
