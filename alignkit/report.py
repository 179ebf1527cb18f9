"""The report: one HTML file that says what was run, what came out, and whether to trust it.

It opens offline: pictures and style are inside, and it neither links to anything nor runs a script.
Everything that came from data, models or options is escaped.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
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
    health,
    label,
    memory,
    show,
)
from alignkit.model_card import model_card
from alignkit.pages import inline, render
from alignkit.plots import draw_plots
from alignkit.run_folder import RunFolder, Samples, atomic_write

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
_MOST_ROWS = 24
"""Sample rows at most in one table."""
_MOST_BETWEEN = 8
"""Sample steps at most between the first and the last."""
_PICTURE_SIDE = 512
"""Pixels of the longer side of a sample picture in the report; the folder keeps the full size."""


def write_report(folder: RunFolder, facts: ReportFacts) -> Path:
    """Write `plots/*.png` and `report.html` from the folder's files and `facts`.

    Returns:
        The path of the report.
    """
    records, config = folder.read_metrics(), folder.read_config() or {}
    plots, plots_left_out = draw_plots(records)
    for plot in plots:
        atomic_write(folder.plots_dir / plot.file, plot.png)
    samples, between, between_left_out = _samples(folder.read_samples())
    html = render(
        "report.html.j2",
        title=facts.title,
        facts=facts,
        subtitle=_subtitle(facts),
        result=_result(facts),
        warnings=[*facts.warnings, *health(records)],
        sections=_sections(facts),
        samples=samples,
        between=between,
        between_left_out=between_left_out,
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
        samples, _, _ = _samples(RunFolder(facts.run_dir).read_samples())
        parts.append(
            {
                "title": facts.title,
                "subtitle": _subtitle(facts),
                "link": quote(Path(os.path.relpath(report, path.parent)).as_posix()),
                "result": _result(facts),
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


def _result(facts: ReportFacts) -> dict[str, Any] | None:
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
    notes = {"equation": _SYMBOLS, "beta": convention}
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


def _samples(
    found: Mapping[int, Samples],
) -> tuple[dict[str, Any] | None, list[dict[str, Any]], int]:
    """First against last; the steps between; and how many of those are left out."""
    if not found:
        return None, [], 0
    steps = list(found)
    between = steps[1:-1]
    if len(between) > _MOST_BETWEEN:
        stride = (len(between) - 1) / (_MOST_BETWEEN - 1)
        between = [between[round(index * stride)] for index in range(_MOST_BETWEEN)]
    first, last = found[steps[0]], found[steps[-1]]
    main = _table([first] if len(steps) == 1 else [first, last])
    tables = [_table([found[step]]) for step in between]
    return main, tables, max(0, len(steps) - 2) - len(between)


def _table(columns: Sequence[Samples]) -> dict[str, Any]:
    """One row per prompt of the last column; the same prompt's answer in the others."""
    last, pictures = columns[-1], columns[-1].pictures
    answers = [_by_occurrence(samples) for samples in columns]
    keys = list(answers[-1])[:_MOST_ROWS]
    cell = _picture if pictures else lambda answer: answer or ""
    return {
        "columns": [_column(samples.step) for samples in columns],
        "pictures": pictures,
        "rows": [
            {"prompt": prompt, "answers": [cell(a.get((prompt, nth))) for a in answers]}
            for prompt, nth in keys
        ],
        "left_out": len(last.prompts) - len(keys),
    }


def _by_occurrence(samples: Samples) -> dict[tuple[str, int], str | Path]:
    """(prompt, how often it came before) -> answer."""
    seen: dict[str, int] = {}
    answers: dict[tuple[str, int], str | Path] = {}
    for index, prompt in enumerate(samples.prompts):
        nth = seen.get(prompt, 0)
        answers[prompt, nth], seen[prompt] = samples.answers[index], nth + 1
    return answers


def _column(step: int) -> str:
    return "before training" if step == 0 else f"after step {step:,}"


def _picture(path: str | Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    from PIL import Image

    with Image.open(path) as picture:
        width, height = picture.size
        if max(width, height) <= _PICTURE_SIDE:
            source = inline(Path(path).read_bytes(), "image/png")
        else:
            smaller = picture.convert("RGB")
            smaller.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE), Image.Resampling.LANCZOS)
            out = io.BytesIO()
            smaller.save(out, "JPEG", quality=88)
            width, height = smaller.size
            source = inline(out.getvalue(), "image/jpeg")
    return {"source": source, "width": width, "height": height, "small": max(width, height) <= 96}
