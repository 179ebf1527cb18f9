"""What a report is made of: plain facts, numbers in readable form, and checks of a run's health."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

from alignkit.errors import CheckpointError
from alignkit.length_control import LengthControlled
from alignkit.statistics import Difference, Mean, WinRate

Series = dict[str, list[tuple[float, float]]]
"""Metric name -> (step, value) pairs."""

BETA_CONVENTION: Mapping[str, str] = {
    "text": "per nat of the log-ratio, with token log-probs summed over the answer",
    "image": "mean squared denoising error with one half (Wallace et al. 2023, arXiv:2311.12908)",
}
"""Modality -> the unit of the log-ratio that beta multiplies."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """One measure of the trained policy, usually against the start.

    Attributes:
        measure: what was measured, such as "win rate against the start (known reward)".
        value: the number; a share for win rates.
        low, high: interval of `value` with the given confidence.
        before, after: the two means that `value` compares, where there are two.
        num: prompts; missing: prompts left out because a score is missing.
        unit: "share" (written as percent), or words that follow the number, such as "nats".
        neutral: the value that means "no change": 0.5 for win rates, 0 for differences.
        better: which direction is an improvement; None where neither is.
        note: anything a reader must know.
    """

    measure: str
    value: float
    low: float | None = None
    high: float | None = None
    before: float | None = None
    after: float | None = None
    num: int | None = None
    missing: int = 0
    confidence: float = 0.95
    unit: str = ""
    neutral: float | None = None
    better: Literal["higher", "lower"] | None = None
    note: str = ""

    @classmethod
    def of(
        cls,
        measure: str,
        result: WinRate | Mean | LengthControlled,
        *,
        unit: str = "",
        better: Literal["higher", "lower"] | None = "higher",
        note: str = "",
    ) -> Self:
        """The row of a win rate, plain or at equal length, a mean or a difference."""
        names = ("value", "low", "high", "num", "missing", "confidence")
        common: dict[str, Any] = {name: getattr(result, name) for name in names}
        if isinstance(result, WinRate):
            note = note or f"{result.wins} wins, {result.ties} ties, {result.losses} losses"
            common |= {"unit": "share", "neutral": 0.5}
        elif isinstance(result, LengthControlled):
            common |= {"unit": "share", "neutral": 0.5}
        else:
            common |= {"unit": unit, "neutral": None if unit == "share" else 0.0}
        if isinstance(result, Difference):
            common |= {"before": result.before, "after": result.after}
        return cls(measure=measure, better=better, note=note, **common)

    @property
    def verdict(self) -> Literal["better", "worse", "no clear change", ""]:
        """Whether the interval leaves the neutral value on one side; "" where that says nothing."""
        if None in (self.neutral, self.low, self.high) or self.better is None:
            return ""
        assert self.low is not None and self.high is not None and self.neutral is not None
        if self.low <= self.neutral <= self.high:
            return "no clear change"
        return "better" if (self.low > self.neutral) == (self.better == "higher") else "worse"

    def number(self, name: Literal["value", "low", "high", "before", "after"]) -> str:
        """A field in readable form; "" where there is none."""
        amount = getattr(self, name)
        if amount is None:
            return ""
        if self.unit == "share":
            return f"{100 * amount:.1f}"
        sign = "+" if self.neutral == 0 and name in ("value", "low", "high") and amount > 0 else ""
        return sign + _show_float(float(amount), digits=3)

    def __str__(self) -> str:
        unit = {"share": " %", "": ""}.get(self.unit, f" {self.unit}")
        text = self.number("value") + unit
        if self.low is not None and self.high is not None:
            text += f" [{self.number('low')}, {self.number('high')}]"
        text += f", n={self.num}" if self.num is not None else ""
        return text + (f", {self.missing} missing" if self.missing else "")


@dataclass(frozen=True, kw_only=True)
class ReportFacts:
    """All that a report says beyond the run folder's own files; stored in result.json.

    Mappings are printed in their order, with `_` as a space; values are plain (numbers, strings,
    lists, mappings).

    Attributes:
        title: such as "DPO on Qwen/Qwen2.5-0.5B-Instruct".
        modality: "text" or "image".
        method: keys with a place of their own are `name`, `loss`, `equation`, `paper`, `beta` and
            `beta_convention` (None: by modality); further ones as they come, usually `reference`,
            `learning_rate`, `batch_size`, `steps`.
        policy: name, parameters, trainable, adapter, precision, device ...
        data: source, rows, used, skipped (a mapping reason -> number) ...
        evaluation: the verdict, most important first.
        citations: BibTeX entries.
        seconds: wall time of the run.
        peak_memory_bytes: of the device, or of the process on a CPU.
        warnings: what the run warned of; health checks of the curves are added by the report.
        environment: as from `run_folder.environment()`; empty takes the config's.
        finished: when, in ISO form.
        run_dir: the run folder.
    """

    title: str
    modality: Literal["text", "image"] = "text"
    method: Mapping[str, Any] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Sequence[EvaluationRow] = ()
    citations: Sequence[str] = ()
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    warnings: Sequence[str] = ()
    environment: Mapping[str, str | None] = field(default_factory=dict)
    finished: str = ""
    run_dir: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for `result.json`."""
        flat = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**flat, "evaluation": [asdict(row) for row in self.evaluation]}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Self:
        """What `as_dict` gave; fields of other versions of alignkit are left out.

        Raises:
            CheckpointError: for a mapping that is no report's.
        """
        try:
            rows = [
                EvaluationRow(**_known(EvaluationRow, r)) for r in mapping.get("evaluation", ())
            ]
            return cls(**{**_known(cls, mapping), "evaluation": tuple(rows)})
        except TypeError as error:
            raise CheckpointError(
                f"The facts in result.json are incomplete: {error}. Restore the file, or run again."
            ) from error


def _known(cls: Any, mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: mapping[f.name] for f in fields(cls) if f.name in mapping}


def show(value: Any) -> str:
    """Any fact in readable form: numbers to four digits, lists and mappings in one line."""
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return _show_float(value)
    if isinstance(value, Mapping):
        return "; ".join(f"{label(key)}: {show(entry)}" for key, entry in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(show(entry) for entry in value) or "none"
    return str(value)


def label(key: str) -> str:
    """A key of the facts as a reader's label."""
    return str(key).replace("_", " ")


def _show_float(value: float, digits: int = 4) -> str:
    if value.is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if 10**digits <= abs(value) < 1e9:
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else text


def duration(seconds: float) -> str:
    """42 s; 3 min 20 s; 2 h 05 min."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def memory(amount: int) -> str:
    """Bytes as MiB or GiB."""
    mebibytes = amount / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes < 1000 else f"{mebibytes / 1024:.1f} GiB"


def series(records: Sequence[Mapping[str, Any]]) -> Series:
    """The curves in the metrics: every numeric field but `step`, over the step."""
    found: Series = {}
    for index, record in enumerate(records):
        step = record.get("step", index)
        for name, value in record.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name != "step" and number and math.isfinite(value):
                found.setdefault(name, []).append((float(step), float(value)))
    return found
