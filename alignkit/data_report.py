"""What a data report is made of, in both wings: findings, tables, plots, pictures.

A wing's `examination.examine(data, options, *, kind, tokenizer)` fills one in; `alignkit.doctor`
shows it. Everything here is plain data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["good", "note", "warning"]


@dataclass(frozen=True)
class Finding:
    """One sentence or two that a person can act on.

    Attributes:
        level: "warning" for what spoils a training run, "note" for what is worth knowing, "good"
            for what was looked for and not found.
        text: what is so, and what to do about it.
    """

    level: Level
    text: str


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers; numbers are shown in readable form."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True)
class Histogram:
    """How values are spread.

    Attributes:
        title: of the plot.
        series: name -> values.
        unit: of the values, such as "tokens".
        marks: name -> value of a vertical line, such as a limit.
    """

    title: str
    series: Mapping[str, Sequence[float]]
    unit: str
    marks: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """An encoded picture of a contact sheet.

    Attributes:
        data: the file's bytes.
        mime: "image/png" or "image/jpeg".
        caption: what it is.
    """

    data: bytes
    mime: str
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Pictures in rows: of one data row those that belong together."""

    title: str
    rows: Sequence[tuple[str, Sequence[Picture]]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """The state of one data set.

    Attributes:
        name: of the data.
        modality: "text" or "image".
        kind: of the rows, as a person reads it: "pairs", "rankings of K answers" ...
        facts: label -> value: the numbers at the top.
        findings: the worst first.
        tables, histograms, galleries: in the order in which they are shown.
    """

    name: str
    modality: str
    kind: str
    facts: Mapping[str, Any]
    findings: Sequence[Finding] = ()
    tables: Sequence[Table] = ()
    histograms: Sequence[Histogram] = ()
    galleries: Sequence[Gallery] = ()
