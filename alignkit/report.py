"""The report: one HTML file that says what was run, what came out, and whether to trust it.

It opens offline: pictures and style are inside, and it neither links to anything nor runs a script.
Everything that came from data, models or options is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import yaml

from alignkit.errors import CheckpointError, ConfigError
from alignkit.facts import (
    BETA_CONVENTION,
    EvaluationRow,
    ReportFacts,
    duration,
    label,
    memory,
    show,
)
from alignkit.health import health
from alignkit.model_card import model_card
from alignkit.pages import inline, render
from alignkit.plots import draw_plots
from alignkit.rollout_files import last_rollout
from alignkit.run_folder import RunFolder, atomic_write
from alignkit.sample_tables import courses, first_and_last, length_table

__all__ = [
    "EvaluationRow",
    "ReportFacts",
    "health",
    "model_card",
    "rebuild",
    "summary_table",
    "write_index",
    "write_report",
]

_SYMBOLS = (
    "b = beta; w, l = log-ratio of policy to reference on the chosen and the rejected answer; "
    "h = w - l; m = target margin; L(x) = -log sigmoid(x)"
)
_TOKEN_SYMBOLS = (
    "x = log-likelihood of a token, or minus an image's denoising error; sg = without gradient"
)


def write_report(folder: RunFolder, facts: ReportFacts) -> Path:
    """Write `plots/*.png` and `report.html` from the folder's files and `facts`.

    Returns:
        The path of the report.
    """
    records, config = folder.read_metrics(), folder.read_config() or {}
    plots, plots_left_out = draw_plots(records)
    for plot in plots:
        atomic_write(folder.plots_dir / plot.file, plot.png)
    found = folder.read_samples()
    html = render(
        "report.html.j2",
        title=facts.title,
        facts=facts,
        subtitle=_subtitle(facts),
        result=result_card(facts),
        warnings=[*facts.warnings, *health(records)],
        sections=_sections(facts),
        samples=first_and_last(found),
        courses=courses(found),
        lengths=length_table(found),
        rollout=last_rollout(folder.samples_dir),
        plots=[
            {"title": p.title, "alt": p.alt, "source": inline(p.png, "image/png")} for p in plots
        ],
        plots_left_out=plots_left_out,
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
        versions=dict(facts.environment or config.get("environment") or {}),
    )
    atomic_write(folder.report_file, html)
    return folder.report_file


def write_index(path: str | Path, runs: Sequence[ReportFacts], *, title: str) -> Path:
    """Write one page over several runs: their results and samples, linked to their reports.

    Args:
        path: of the page. Links are relative to it, so that a folder of runs moves as a whole.
        runs: the facts of each run; their run folders hold the samples.
        title: of the page.
    """
    path = Path(path)
    parts = []
    for facts in runs:
        report = Path(facts.run_dir) / "report.html"
        samples = first_and_last(RunFolder(facts.run_dir).read_samples())
        parts.append(
            {
                "title": facts.title,
                "subtitle": _subtitle(facts),
                "link": quote(Path(os.path.relpath(report, path.parent)).as_posix()),
                "result": result_card(facts),
                "samples": samples,
            }
        )
    atomic_write(path, render("index.html.j2", title=title, runs=parts))
    return path


def rebuild(run_dir: str | Path) -> Path:
    """Write the report again from the run folder alone; of an unfinished run, what there is.

    Raises:
        ConfigError: where there is no run.
        CheckpointError: for a folder whose files cannot be read.
    """
    path = Path(run_dir).expanduser()
    if not any((path / name).exists() for name in ("config.yaml", "metrics.jsonl", "result.json")):
        raise ConfigError(
            f"A report is made from the folder of a run; {path} is none. Give the run_dir of a run "
            "(the folder with config.yaml and metrics.jsonl)."
        )
    folder = RunFolder(path)
    result = folder.read_result()
    if result is None:
        return write_report(folder, _unfinished(folder))
    if not isinstance(result.get("facts"), dict):
        raise CheckpointError(
            f"{path / 'result.json'} has no facts for a report. Restore the file, or run again."
        )
    return write_report(folder, replace(ReportFacts.from_dict(result["facts"]), run_dir=str(path)))


def summary_table(facts: ReportFacts) -> str:
    """The result for the terminal; ends with the report's path."""
    rows = [(row.measure, f"{row}  {row.verdict}".rstrip()) for row in facts.evaluation]
    rows += _costs(facts)
    width = max((len(name) for name, _ in rows), default=0)
    lines = [facts.title, *(f"  {name:<{width}}  {value}" for name, value in rows)]
    lines += [f"  warning: {warning}" for warning in facts.warnings]
    return "\n".join([*lines, f"Report: {Path(facts.run_dir) / 'report.html'}"])


def _unfinished(folder: RunFolder) -> ReportFacts:
    pictures = any(samples.pictures for samples in folder.read_samples().values())
    modality: Literal["text", "image"] = "image" if pictures else "text"
    warning = "This run has not finished: the report shows what there is so far."
    return ReportFacts(
        title=folder.path.name, modality=modality, warnings=(warning,), run_dir=str(folder.path)
    )


def _subtitle(facts: ReportFacts) -> list[str]:
    method = facts.method.get("name")
    parts = [str(method).upper() if method else "", f"{facts.modality} model"]
    return [part for part in (*parts, facts.finished.replace("T", " ")) if part]


def result_card(facts: ReportFacts) -> dict[str, Any] | None:
    """The verdict's table: what was measured, and what it cost."""
    rows, costs = facts.evaluation, _costs(facts)
    if not rows and not costs:
        return None
    levels = {row.confidence for row in rows if row.low is not None}
    return {
        "rows": rows,
        "costs": costs,
        "with_means": any(row.before is not None for row in rows),
        "interval": f"{100 * levels.pop():g} % interval" if len(levels) == 1 else "Interval",
    }


def _costs(facts: ReportFacts) -> list[tuple[str, str]]:
    costs = []
    if facts.seconds is not None:
        costs.append(("time", duration(facts.seconds)))
    if facts.peak_memory_bytes is not None:
        costs.append(("peak memory", memory(facts.peak_memory_bytes)))
    return costs


def _sections(facts: ReportFacts) -> list[tuple[str, list[dict[str, Any]]]]:
    """The cards of "what was run": heading and rows (label, text, code?, note)."""
    method = dict(facts.method)
    convention = method.pop("beta_convention", None) or BETA_CONVENTION.get(facts.modality, "")
    symbols = _SYMBOLS if "beta" in method else _TOKEN_SYMBOLS
    notes = {"equation": symbols, "beta": convention}
    sections = (("Method", method), ("Policy", facts.policy), ("Data", facts.data))
    return [
        (
            heading,
            [
                {
                    "label": label(key),
                    "text": show(value),
                    "code": key == "equation",
                    "note": notes.get(key, "") if heading == "Method" and value else "",
                }
                for key, value in mapping.items()
            ],
        )
        for heading, mapping in sections
        if mapping
    ]
