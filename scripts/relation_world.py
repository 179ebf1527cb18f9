"""Preferences over a relation: two named things side by side, on one level, neither near nor far.

Both pictures of a pair hold the same things, equally large, on the same background; only where they
stand differs. So no mean colour tells which is better. The people of this world look at how far the
two things are from standing on one level, `APART` from each other. Where two pictures hardly differ
in that, they see a tie; else they are wrong as often as `WRONG` says. As among pictures that people
chose, the better one of a pair is good, and the other one may be anything.

Rows have Pick-a-Pic's columns. Their captions come from compositions of the training split.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from alignkit.demo.scene_drawing import Scene, ScenePrompt, draw_scene, rearrange, render
from alignkit.demo.scene_judge import offset
from alignkit.demo.scene_world import Split, make_prompts

TIES, WRONG = 0.11, 0.15
"""Shares: of ties among the pairs, and of wrong labels among the others."""
APART = 0.45
"""How far from each other two things stand best, in picture sides."""
GOOD = -0.08
"""What the better picture of a pair is planned to be worth at least."""
LEVEL, CLEAR = 0.05, 0.25
"""Differences of `beside`: ties have less than the first, other pairs at least the second."""
MISSING = -2.0
"""What a picture without one of the things is worth: less than any picture with both."""

Row = dict[str, Any]


def beside(prompt: ScenePrompt | str, picture: Image) -> float:
    """Minus how far the named things are from standing side by side; 0 is best (picture sides)."""
    found = offset(prompt, picture)
    return MISSING if found is None else _worth(*found)


def _worth(across: float, down: float) -> float:
    return -abs(down) - abs(abs(across) - APART)


def reward(
    prompts: Sequence[str],
    pictures: Sequence[Image],
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> list[float]:
    """`beside` of each picture, as a reward that alignkit calls."""
    return [beside(prompt, picture) for prompt, picture in zip(prompts, pictures, strict=True)]


def make_rows(num: int, seed: int, split: Split = "train") -> list[Row]:
    """Pairs with two labels of the first picture: `true`, and `people`'s, who err.

    1 where it is better, 0 where the other one is, 0.5 for a tie.
    """
    rng = np.random.default_rng([seed, 0x51DE])
    prompts = make_prompts(min(num, PROMPTS[split]), seed, split)
    return [_row(prompts[i % len(prompts)], rng) for i in range(num)]


PROMPTS = {"train": 2000, "heldout": 1000}
"""Distinct prompts of each split at most."""


def _row(prompt: ScenePrompt, rng: np.random.Generator) -> Row:
    tie, wrong = rng.random() < TIES, rng.random() < WRONG
    scene = draw_scene(prompt, rng)
    while True:
        scenes = [_arranged(scene, -math.inf if tie else GOOD, rng), rearrange(scene, rng)]
        if rng.random() < 0.5:
            scenes.reverse()
        # Drawing moves the worth a little; far from what is asked, no picture need be rendered.
        planned = abs(_planned(scenes[0]) - _planned(scenes[1]))
        if planned > 2 * LEVEL if tie else planned < CLEAR - LEVEL:
            continue
        pictures = [render(one, seed=int(rng.integers(2**31))) for one in scenes]
        first, second = (beside(prompt, picture) for picture in pictures)
        if abs(first - second) < LEVEL if tie else abs(first - second) >= CLEAR:
            break
    true = 0.5 if tie else float(first > second)
    return {
        "caption": prompt.text,
        "jpg_0": _png(pictures[0]),
        "jpg_1": _png(pictures[1]),
        "true": true,
        "people": 1 - true if wrong else true,
    }


def _arranged(scene: Scene, least: float, rng: np.random.Generator) -> Scene:
    while _planned(moved := rearrange(scene, rng)) < least:
        pass
    return moved


def _planned(scene: Scene) -> float:
    first, second = scene.objects
    return _worth(first.x - second.x, first.y - second.y)


def _png(picture: Image) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    return sink.getvalue()


def write_rows(path: Path, rows: Sequence[Row], labels: str) -> Path:
    """Rows as a Pick-a-Pic parquet file whose labels are those of one column."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    kept = ("caption", "jpg_0", "jpg_1")
    told = [{name: row[name] for name in kept} | {"label_0": row[labels]} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(told), path, row_group_size=256)
    return path
