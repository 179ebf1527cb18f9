"""A data report for the terminal and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from alignkit.data_report import DataReport, Finding, Table
from alignkit.facts import label, show
from alignkit.pages import inline, render
from alignkit.plots import draw_histogram

_ORDER = {"warning": 0, "note": 1, "good": 2}


def terminal(report: DataReport) -> str:
    """The report as plain text."""
    lines = [f"{report.name}: {report.kind}"]
    width = max((len(label(name)) for name in report.facts), default=0)
    lines += [f"  {label(name):<{width}}  {show(value)}" for name, value in report.facts.items()]
    for table in report.tables:
        lines += ["", f"  {table.title}", *_aligned(table)]
        lines += [f"    {table.note}"] if table.note else []
    lines += [""] if report.findings else []
    lines += [f"  {f.level}: {f.text}" for f in _sorted(report)]
    return "\n".join(lines)


def page(report: DataReport) -> str:
    """The report as HTML that opens offline."""
    plots = [draw_histogram(one) for one in report.histograms if any(map(len, one.series.values()))]
    return render(
        "data.html.j2",
        title=f"Data report: {report.name}",
        report=report,
        facts=[(label(name), show(value)) for name, value in report.facts.items()],
        findings=_sorted(report),
        plots=[
            {"title": p.title, "alt": p.alt, "source": inline(p.png, "image/png")} for p in plots
        ],
        galleries=[
            {
                "title": gallery.title,
                "note": gallery.note,
                "rows": [
                    (title, [(p.caption, inline(p.data, p.mime)) for p in pictures])
                    for title, pictures in gallery.rows
                ],
            }
            for gallery in report.galleries
        ],
    )


def _sorted(report: DataReport) -> Sequence[Finding]:
    return sorted(report.findings, key=lambda finding: _ORDER[finding.level])


def _aligned(table: Table) -> list[str]:
    cells = [list(map(str, table.columns)), *([show(c) for c in row] for row in table.rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(table.columns))]
    return [
        "    "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
