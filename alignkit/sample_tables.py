"""Samples as tables of a page: first against last, and each prompt's course through training."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.pages import inline
from alignkit.sample_files import Samples, lengths

MOST_ROWS = 24
"""Sample rows at most in one table."""
MOST_STEPS = 10
"""Steps at most in a prompt's course, the first and the last among them."""
PICTURE_SIDE = 512
"""Pixels of the longer side of a sample picture on a page; the folder keeps the full size."""


def first_and_last(found: Mapping[int, Samples]) -> dict[str, Any] | None:
    """The table of before and after; None without samples."""
    if not found:
        return None
    steps = list(found)
    ends = [found[steps[0]]] if len(steps) == 1 else [found[steps[0]], found[steps[-1]]]
    return table(ends, [_step(samples.step) for samples in ends])


def courses(found: Mapping[int, Samples]) -> list[dict[str, Any]]:
    """What became of the answer to each prompt, step by step; empty without steps in between.

    A prompt's course holds the steps at which it was asked, evenly thinned out.
    """
    if len(found) < 3:
        return []
    answers = {step: _by_occurrence(samples) for step, samples in found.items()}
    last = found[list(found)[-1]]
    return [
        _course(key, answers, found, last.pictures) for key in list(answers[last.step])[:MOST_ROWS]
    ]


def length_table(found: Mapping[int, Samples]) -> list[dict[str, str]]:
    """How long the answers are at each step, where tokens were counted."""
    rows = []
    for samples in found.values():
        if samples.tokens:
            told = lengths(samples.tokens, samples.cut)
            row = {name: f"{value:,.0f}" for name, value in told.items()}
            rows.append({"step": _step(samples.step), **row, "cut": f"{100 * told['cut']:.0f} %"})
    return rows


def table(columns: Sequence[Samples], labels: Sequence[str]) -> dict[str, Any]:
    """One row per prompt of the last column; the same prompt's answer in the others."""
    last = columns[-1]
    answers = [_by_occurrence(samples) for samples in columns]
    keys = list(answers[-1])[:MOST_ROWS]
    return {
        "columns": list(labels),
        "pictures": last.pictures,
        "rows": [
            {
                "prompt": key[0],
                "answers": [_cell(a.get(key), last.pictures) for a in answers],
            }
            for key in keys
        ],
        "left_out": len(last.prompts) - len(keys),
    }


Occurrence = tuple[str, int]
"""A prompt, and how often it came before."""


def _course(
    key: Occurrence,
    answers: Mapping[int, Mapping[Occurrence, tuple[str | Path, int]]],
    found: Mapping[int, Samples],
    pictures: bool,
) -> dict[str, Any]:
    asked = [step for step, given in answers.items() if key in given]
    kept = _thinned(asked)
    entries = []
    for step in kept:
        place = answers[step][key][1]
        tokens = found[step].tokens
        note = f"{tokens[place]:,} tokens" if tokens else ""
        note += ", cut" if tokens and found[step].cut[place] else ""
        cell = _cell(answers[step][key], pictures)
        entries.append({"step": _step(step), "answer": cell, "note": note})
    left_out = len(asked) - len(kept)
    return {"prompt": key[0], "pictures": pictures, "entries": entries, "left_out": left_out}


def _thinned(steps: Sequence[int]) -> list[int]:
    if len(steps) <= MOST_STEPS:
        return list(steps)
    stride = (len(steps) - 1) / (MOST_STEPS - 1)
    return [steps[round(index * stride)] for index in range(MOST_STEPS)]


def _by_occurrence(samples: Samples) -> dict[Occurrence, tuple[str | Path, int]]:
    """(prompt, how often it came before) -> answer and its place."""
    seen: dict[str, int] = {}
    answers: dict[Occurrence, tuple[str | Path, int]] = {}
    for index, prompt in enumerate(samples.prompts):
        nth = seen.get(prompt, 0)
        answers[prompt, nth], seen[prompt] = (samples.answers[index], index), nth + 1
    return answers


def _cell(answer: tuple[str | Path, int] | None, pictures: bool) -> Any:
    if pictures:
        return picture(None if answer is None else answer[0])
    return "" if answer is None else answer[0]


def _step(step: int) -> str:
    return "before training" if step == 0 else f"after step {step:,}"


def picture(path: str | Path | None) -> dict[str, Any] | None:
    """A picture file for a page: inlined, and made smaller where it is large."""
    if path is None:
        return None
    from PIL import Image

    with Image.open(path) as opened:
        width, height = opened.size
        if max(width, height) <= PICTURE_SIDE:
            source = inline(Path(path).read_bytes(), "image/png")
        else:
            smaller = opened.convert("RGB")
            smaller.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
            out = io.BytesIO()
            smaller.save(out, "JPEG", quality=88)
            width, height = smaller.size
            source = inline(out.getvalue(), "image/jpeg")
    return {"source": source, "width": width, "height": height, "small": max(width, height) <= 96}
