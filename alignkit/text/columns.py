"""The columns of a preference row: which must be there, and what its numbers may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from alignkit.errors import DataError, nearest
from alignkit.text.formats import BadRow

TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")
IMAGES = ("image", "images")
NEUTRAL = {"weight": 1.0, "target_margin": 0.0, "p_chosen": 1.0}
"""What a row without the number is given, by the batch's name for it."""

_COLUMN_OF = {"weight": "weight", "margin": "target_margin", "p_chosen": "p_chosen"}
_RANGES = {"weight": (0.0, math.inf, " of at least 0"), "p_chosen": (0.0, 1.0, " between 0 and 1")}


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The optional numeric columns of a row, checked; csv files hold them as text."""
    values = {}
    for theirs, ours in _COLUMN_OF.items():
        value = row.get(theirs)
        if value is None or value == "":
            continue
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        low, high, within = _RANGES.get(theirs, (-math.inf, math.inf, ""))
        if not (math.isfinite(number) and low <= number <= high):
            raise BadRow(f"{theirs} is a finite number{within}; got {value!r}")
        values[ours] = number
    return values


def check_columns(row: Mapping[str, Any], name: str) -> None:
    """Raise `DataError` unless the columns are those of preference rows, without images."""
    images = [column for column in IMAGES if row.get(column)]
    if images:
        raise DataError(
            f"{name} has image columns {images}: vision-language policies are not supported. "
            "Remove the columns, or give a diffusion pipeline as policy."
        )
    needed = TOKENS if TOKENS[0] in row else ("chosen", "rejected")
    for column in needed:
        if column not in row:
            known = ", ".join(sorted(row)) or "none"
            raise DataError(
                f"{name}: preference rows need the columns prompt, chosen and rejected; {column!r} "
                f"is missing. Columns found: {known}.{nearest(column, row)} Rename with "
                f"data_options.columns={{{column!r}: '<your column>'}}."
            )
