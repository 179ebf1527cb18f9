"""Columns of the data that a method cannot do without, or has no use for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError, DataError
from alignkit.rows import read_rows

if TYPE_CHECKING:
    from alignkit.config import RunConfig
    from alignkit.objectives.criterion import Criterion

COLUMNS = {
    "p_chosen": "p_chosen",
    "target_margin": "margin",
    "score_chosen": "score_chosen",
    "score_rejected": "score_rejected",
}
"""Field of the scores -> the column that it comes from."""

_OF_PAIRS = ("p_chosen", "target_margin")


def check_columns(config: RunConfig, criterion: Criterion) -> None:
    """Look at the first row, before any weight is loaded, where the loss is particular about it.

    Raises:
        ConfigError: for a column that has no meaning for the loss.
        DataError: for data that cannot be read, or that lacks a column the loss needs.
    """
    loss = criterion.loss
    refused = dict(getattr(loss, "refuses", {}))
    if criterion.kind.rows != "pairs":
        refused |= dict.fromkeys(_OF_PAIRS, f"it speaks of a pair, and rows are {_rows(criterion)}")
    needed = [name for name in loss.needs if name in COLUMNS]
    streamed = not isinstance(config.data, (str, Path)) and not hasattr(config.data, "__len__")
    if streamed or not (refused or needed):
        return  # a stream would be read to its end for its first row
    rows = read_rows(config.data, columns=_renamed(config.data_options))
    first = rows[0]
    for name, reason in refused.items():
        if first.get(COLUMNS[name]) not in (None, ""):
            raise ConfigError(
                f"Loss {loss.name!r} does not take the column {COLUMNS[name]!r}: {reason}. Leave "
                "the column out, or take a loss such as 'sigmoid'."
            )
    for name in needed:
        if first.get(COLUMNS[name]) in (None, ""):
            raise DataError(
                f"Loss {loss.name!r} needs the column {COLUMNS[name]!r}, and the first row of "
                f"{rows.name} has none. Columns found: {', '.join(sorted(map(str, first)))}. Add "
                "it, rename one with data_options.columns, or take a loss such as 'sigmoid'."
            )


def _rows(criterion: Criterion) -> str:
    return {"groups": "rankings"}.get(criterion.kind.rows, "single answers")


def _renamed(options: Any) -> Mapping[str, str]:
    if isinstance(options, Mapping):
        return options.get("columns") or {}
    return getattr(options, "columns", {})
