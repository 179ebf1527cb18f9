"""The state of a set of text rows: how many, how long, how balanced, and what a run would lose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np

from alignkit.columns import SAME, check_kind
from alignkit.data_report import DataReport, Histogram, Table
from alignkit.errors import DataError
from alignkit.options import TextOptions
from alignkit.rows import read_rows
from alignkit.stream import is_streamed, open_stream
from alignkit.text.characters import Characters
from alignkit.text.data import Reader
from alignkit.text.examination_findings import findings_of
from alignkit.text.examples import TokenRow
from alignkit.text.layouts import recognise
from alignkit.text.row_kinds import LAYOUTS

CHUNK = 512
NAMES = {
    "pairs": ("chosen", "rejected"),
    "groups": ("answers",),
    "unpaired": ("answers",),
    "supervised": ("answers",),
    "rated": ("answers",),
    "critiques": ("answers",),
    "prompts": (),
}
SHOWN = {
    "pairs": "pairs",
    "groups": "rankings of K answers",
    "unpaired": "single labelled answers",
    "supervised": "demonstrations",
    "rated": "rated answers",
    "critiques": "critiques of answers",
    "prompts": "prompts to answer",
}


@dataclass
class Seen:
    """What a pass over the rows has counted.

    Attributes:
        rows: all that were there.
        prompts: lengths of the prompts of usable rows.
        answers: lengths by name.
        longest: of each usable row, prompt and longest answer.
        repeated: rows that were there before, word for word.
        prompt_keys: how often each prompt came.
        reversed: pairs that were there before with their sides exchanged.
        liked: usable single answers with label true.
    """

    rows: int = 0
    prompts: list[int] = field(default_factory=list)
    answers: dict[str, list[int]] = field(default_factory=dict)
    longest: list[int] = field(default_factory=list)
    repeated: int = 0
    reversed: int = 0
    liked: int = 0
    prompt_keys: Counter[int] = field(default_factory=Counter)
    keys: set[int] = field(default_factory=set)

    @property
    def usable(self) -> int:
        return len(self.prompts)


def examine(data: Any, options: TextOptions, *, kind: str, tokenizer: str | None) -> DataReport:
    """See `alignkit.doctor`."""
    streamed = is_streamed(data, options.streaming)
    rows = (open_stream if streamed else read_rows)(data, columns=options.columns)
    first = next(iter(rows))
    kind = kind_of(first, rows.name) if kind == "auto" else kind
    check_kind(kind, tuple(LAYOUTS))
    layout = recognise(first, kind)
    unlimited = replace(options, on_bad_row="skip", identical_pairs="skip", max_length=2**30)
    reader = Reader(rows, _tokenizer(tokenizer), unlimited, kind)
    seen = Seen()
    for chunk in _chunks(enumerate(rows)):
        usable, labels = reader.read(chunk)
        seen.rows += len(chunk)
        for row, label in zip(usable, labels, strict=True):
            _count(seen, row, NAMES[kind])
            seen.liked += bool(label.desirable)
    unit = "characters" if tokenizer is None else "tokens"
    losses = _losses(seen, reader.skipped, options, counted=tokenizer is not None)
    facts: dict[str, Any] = {
        "rows": seen.rows,
        "usable": seen.usable if kind != "unpaired" else f"{seen.usable} answers",
        "distinct prompts": len(seen.prompt_keys),
    }
    if layout is not None:
        facts["columns of"] = layout.name
    series = {"prompt": seen.prompts, **seen.answers}
    whole = "Prompt and longest answer"
    marks = {"max_length": float(options.max_length)} if tokenizer is not None else {}
    return DataReport(
        name=rows.name,
        modality="text",
        kind=SHOWN[kind],
        facts=facts,
        findings=findings_of(seen, reader.skipped, losses, kind, unit),
        tables=[*_lengths(series, unit), *_left_out(losses)],
        histograms=[
            Histogram("Lengths", series, unit),
            *([Histogram(whole, {"rows": seen.longest}, unit, marks)] if seen.answers else []),
        ],
    )


def kind_of(row: Mapping[str, Any], name: str) -> str:
    """The kind of rows that a first row has the columns of.

    Raises:
        DataError: if it has those of none.
    """
    for kind in LAYOUTS:
        if recognise(row, kind) is not None or any(_has(row, one) for one in LAYOUTS[kind]):
            return kind
    found = ", ".join(sorted(map(str, row)))
    raise DataError(
        f"{name} has the columns of no kind of rows that is known; found: {found}. Rename with "
        "data_options.columns, and see docs/data-formats.md."
    )


def _has(row: Mapping[str, Any], layout: Sequence[str | tuple[str, ...]]) -> bool:
    either = [one if isinstance(one, tuple) else (one,) for one in layout]
    return all(any(name in row for name in names) for names in either)


def _tokenizer(place: str | None) -> Any:
    if place is None:
        return Characters()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place)
    except Exception as error:  # the hub client and the files of a folder all raise here
        raise DataError(f"{place!r} has no tokenizer that can be loaded: {error}") from error


def _chunks(items: Iterator[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    while chunk := list(islice(items, CHUNK)):
        yield chunk


def _count(seen: Seen, row: TokenRow, names: Sequence[str]) -> None:
    prompt = _key([row.prompt])
    sides = [_key([answer]) for answer in row.answers]
    whole = hash((prompt, *sides))
    seen.repeated += whole in seen.keys
    seen.reversed += len(sides) == 2 and hash((prompt, *sides[::-1])) in seen.keys
    seen.keys.add(whole)
    seen.prompt_keys[prompt] += 1
    seen.prompts.append(len(row.prompt))
    lengths = [len(answer) for answer in row.answers]
    seen.longest.append(len(row.prompt) + max(lengths, default=0))
    for place, length in enumerate(lengths):
        name = names[place] if place < len(names) and len(names) > 1 else names[-1]
        seen.answers.setdefault(name, []).append(length)


def _key(arrays: Iterable[np.ndarray]) -> int:
    digest = blake2b(digest_size=8)
    for array in arrays:
        digest.update(array.tobytes())
    return int.from_bytes(digest.digest(), "big")


def _losses(
    seen: Seen, skipped: Mapping[str, int], options: TextOptions, *, counted: bool
) -> list[tuple[str, int, str]]:
    """(what, how many rows, under which option) a run would leave out or cut."""
    found = [(reason, count, _policy(reason, options)) for reason, count in skipped.items()]
    if not counted:
        return found
    limit = options.max_length
    over = int(np.sum(np.asarray(seen.longest) > limit))
    full = int(np.sum(np.asarray(seen.prompts) >= limit)) if options.truncation != "keep_end" else 0
    how = f"max_length={limit}, truncation={options.truncation!r}"
    if options.truncation == "error":
        return [*found, ("longer than max_length", over, how)] if over else found
    if full:
        found.append(("the prompt leaves no room for an answer", full, how))
    return [*found, ("cut to max_length", over - full, how)] if over > full else found


def _policy(reason: str, options: TextOptions) -> str:
    if reason in SAME.values():
        return f"identical_pairs={options.identical_pairs!r}"
    return "always" if reason == "tie" else f"on_bad_row={options.on_bad_row!r}"


def _lengths(series: Mapping[str, Sequence[int]], unit: str) -> list[Table]:
    columns = ("", "least", "median", "90 %", "99 %", "most", "mean")
    rows = [
        (
            name,
            *(float(np.percentile(values, q)) for q in (0, 50, 90, 99, 100)),
            float(np.mean(values)),
        )
        for name, values in series.items()
        if len(values)
    ]
    note = "" if unit == "tokens" else "Give a tokenizer to count tokens."
    return [Table(f"Lengths in {unit}", columns, rows, note)] if rows else []


def _left_out(losses: Sequence[tuple[str, int, str]]) -> list[Table]:
    columns = ("what", "rows", "option")
    return [Table("What a run would leave out or cut", columns, losses)] if losses else []
