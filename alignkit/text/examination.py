"""The state of a set of text rows: how many, how long, how balanced, and what a run would lose."""

from __future__ import annotations

from typing import Any

from alignkit.columns import KINDS, check_kind
from alignkit.data_report import DataReport
from alignkit.options import TextOptions
from alignkit.rows import read_rows


def examine(data: Any, options: TextOptions, *, kind: str, tokenizer: str | None) -> DataReport:
    """See `alignkit.doctor`."""
    rows = read_rows(data, columns=options.columns)
    kind = KINDS[0] if kind == "auto" else kind
    check_kind(kind)
    return DataReport(name=rows.name, modality="text", kind=kind, facts={"rows": len(rows)})
