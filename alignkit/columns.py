"""The columns of preference rows in both wings: which must be there, what their numbers may be, and
what happens to a row that cannot be used."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from alignkit.errors import DataError, nearest, refuse_unknown

log = logging.getLogger("alignkit")

KINDS = ("pairs", "groups", "unpaired", "supervised")
"""Preferences as a pair, as a ranking of K answers, as single answers with a label; and
demonstrations, which are answers to learn.
"""

SAME = {"pairs": "chosen and rejected are the same", "groups": "all answers are the same"}
"""Why a row without two different answers is left out."""

TIE = "tie"
"""Why a row that prefers no answer is left out."""

_RANGES = {"weight": (0.0, math.inf, " of at least 0"), "p_chosen": (0.0, 1.0, " between 0 and 1")}

Column = str | tuple[str, ...]
"""A column, or several of which one is enough; errors name the first."""


class BadRow(Exception):
    """A row that cannot be used; the data's policy decides whether that is an error.

    Args:
        reason: a few words, the same for all rows of the kind; rows are counted under it.
        detail: what is wrong with this row and what was expected, where the reason does not say it.
    """

    def __init__(self, reason: str, detail: str | None = None) -> None:
        super().__init__(detail or reason)
        self.reason = reason


class Tie(BadRow):
    """A row that prefers neither answer: left out and counted, whatever `on_bad_row` says."""


class Named(Protocol):
    """Data as errors name it."""

    @property
    def name(self) -> str: ...

    def where(self, index: int) -> str:
        """A row, by its number."""
        ...


class Sieve:
    """Refuses rows or leaves them out, as the options say.

    Args:
        rows: named in errors.
        on_bad_row: "error" or "skip".

    Attributes:
        skipped: reason -> how many rows were left out.
    """

    def __init__(self, rows: Named, on_bad_row: str) -> None:
        self.rows = rows
        self.on_bad_row = on_bad_row
        self.skipped: Counter[str] = Counter()

    @contextmanager
    def guard(self, index: int) -> Iterator[None]:
        """Turns a `BadRow` inside into a `DataError` or a counted skip."""
        try:
            yield
        except Tie as tie:
            self.skipped[tie.reason] += 1
        except BadRow as bad:
            if self.on_bad_row == "error":
                raise DataError(
                    f"{self.rows.where(index)} cannot be used: {bad}. Mend the row, or leave such "
                    'rows out, counted, with data_options.on_bad_row="skip".'
                ) from bad
            self.skipped[bad.reason] += 1

    def leave_out(self, index: int, reason: str, *, option: str, how: str, fix: str) -> None:
        """Leave a row out under `data_options.<option>`, or refuse it where that is "error"."""
        if how == "error":
            raise DataError(
                f"{self.rows.where(index)}: {reason}. Remove the row, or leave such rows out, "
                f'counted, with data_options.{option}="{fix}".'
            )
        self.skipped[reason] += 1

    def warn(self, name: str | None = None) -> None:
        """Say how many rows were left out, and why."""
        warn_of_skipped(name or self.rows.name, self.skipped)


def warn_of_skipped(name: str, skipped: Mapping[str, int]) -> None:
    """Say how many rows of a data set were left out, and why."""
    for reason, count in skipped.items():
        log.warning("%s: %d rows left out: %s.", name, count, reason)


def check_columns(
    row: Mapping[str, Any],
    kind: str,
    layouts: Mapping[str, Sequence[tuple[Column, ...]]],
    name: str,
) -> None:
    """Raise `DataError` unless a row has all columns of a layout of its kind.

    Args:
        row: its keys are looked at.
        kind: of `layouts`.
        layouts: kind -> the ways in which rows of it may be written.
        name: of the data.
    """
    missing = min((_missing(row, layout) for layout in layouts[kind]), key=len)
    if not missing:
        return
    found = sorted(map(str, row))
    written = ", or ".join(
        ", ".join(_first(column) for column in layout) for layout in layouts[kind]
    )
    hints = "".join(nearest(column, found) for column in missing)
    # Almost every row has a prompt, so that rows could be of prompts says nothing.
    others = [k for k in layouts if k != "prompts"]
    fits = [k for k in others if any(not _missing(row, layout) for layout in layouts[k])]
    other = f" They are the columns of {fits[0]}: take a method or loss for those." if fits else ""
    raise DataError(
        f"{name}: rows of {kind} have the columns {written}; {', '.join(map(repr, missing))} is "
        f"missing. Columns found: {', '.join(found) or 'none'}.{hints}{other} Rename with "
        f"data_options.columns={{{missing[0]!r}: '<your column>'}}."
    )


def _missing(row: Mapping[str, Any], layout: tuple[Column, ...]) -> list[str]:
    either = (column if isinstance(column, tuple) else (column,) for column in layout)
    return [names[0] for names in either if not any(name in row for name in names)]


def _first(column: Column) -> str:
    return column if isinstance(column, str) else " or ".join(column)


def check_kind(kind: str, known: Sequence[str] = KINDS) -> None:
    """Raise `ConfigError` unless rows of this kind can be read."""
    refuse_unknown("kind of rows", kind, known)


def number(row: Mapping[str, Any], name: str) -> float | None:
    """A number of a row; None where the column is absent or empty. csv files hold it as text."""
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    low, high, within = _RANGES.get(name, (-math.inf, math.inf, ""))
    if not (math.isfinite(found) and low <= found <= high):
        raise BadRow(f"bad {name}", f"{name} is a finite number{within}; got {value!r}")
    return found
