"""What the policy answered at some steps, on disk: JSON lines for text, PNG files for pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alignkit.atomic import atomic_folder, atomic_write
from alignkit.records import broken, to_json

if TYPE_CHECKING:
    from PIL.Image import Image

_STEP = re.compile(r"step-(\d+)(\.jsonl)?")


@dataclass(frozen=True)
class Samples:
    """What the policy answered at one step.

    Attributes:
        step: 0 is before training.
        prompts: one per answer.
        answers: strings, or the paths of pictures.
        tokens: of each answer; empty where nobody counted.
        cut: whether each answer was ended by the limit of new tokens.
    """

    step: int
    prompts: tuple[str, ...]
    answers: tuple[str, ...] | tuple[Path, ...]
    tokens: tuple[int, ...] = ()
    cut: tuple[bool, ...] = ()

    @property
    def pictures(self) -> bool:
        """Whether the answers are pictures."""
        return bool(self.answers) and isinstance(self.answers[0], Path)


def lengths(tokens: Sequence[int], cut: Sequence[bool]) -> dict[str, float]:
    """Median, tail and longest of answers in tokens, and the share that the limit ended."""
    return {
        "tokens_median": float(np.median(tokens)),
        "tokens_p95": float(np.quantile(tokens, 0.95)),
        "tokens_max": float(max(tokens)),
        "cut": float(np.mean(cut)),
    }


def write_samples(
    root: Path,
    step: int,
    prompts: Sequence[str],
    answers: Sequence[str | Image],
    tokens: Sequence[int] = (),
    cut: Sequence[bool] = (),
) -> Path:
    """Write one step's answers below `root`, whole or not at all, in place of earlier ones."""
    if len(prompts) != len(answers):
        raise ValueError(
            f"write_samples needs one answer per prompt; got {len(prompts)} prompts and "
            f"{len(answers)} answers."
        )
    target = root / f"step-{step:06d}"
    if all(isinstance(answer, str) for answer in answers):
        target = target.with_suffix(".jsonl")
        rows: list[dict[str, Any]] = [
            {"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)
        ]
        counted = zip(tokens, cut, strict=True)
        for row, (length, limited) in zip(rows, counted, strict=bool(tokens)):
            row |= {"tokens": length, "cut": limited}
        atomic_write(target, "".join(to_json(row, "samples") + "\n" for row in rows))
        return target
    with atomic_folder(target) as folder:
        for index, picture in enumerate(answers):
            assert not isinstance(picture, str), "samples are all text or all pictures"
            picture.save(folder / f"{index:03d}.png")
        (folder / "prompts.json").write_text(json.dumps(list(prompts)), encoding="utf-8")
    return target


def read_samples(root: Path) -> dict[int, Samples]:
    """Step -> samples, in the order of steps."""
    found: dict[int, Samples] = {}
    for path in root.glob("step-*"):
        match = _STEP.fullmatch(path.name)
        if match is None:
            continue
        step = int(match[1])
        try:
            found[step] = _read_text(step, path) if match[2] else _read_pictures(step, path)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise broken(path, str(error)) from error
    return dict(sorted(found.items()))


def _read_text(step: int, path: Path) -> Samples:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    counted = [row for row in rows if "tokens" in row]
    return Samples(
        step,
        tuple(row["prompt"] for row in rows),
        tuple(row["answer"] for row in rows),
        tuple(row["tokens"] for row in counted),
        tuple(row["cut"] for row in counted),
    )


def _read_pictures(step: int, path: Path) -> Samples:
    prompts = json.loads((path / "prompts.json").read_text(encoding="utf-8"))
    pictures = tuple(path / f"{index:03d}.png" for index in range(len(prompts)))
    for picture in pictures:
        picture.stat()
    return Samples(step, tuple(prompts), pictures)
