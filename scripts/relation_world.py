"""Preferences over a relation: two named things side by side rather than one above the other.

Both pictures of a pair hold the same things, equally large, on the same background; only where they
stand differs. So no mean colour tells which is better. The people of this world look at how much
further apart the two things are sideways than in height. Where two pictures hardly differ in that,
they see a tie; else they are wrong as often as `WRONG` says.

Rows have Pick-a-Pic's columns. Their captions come from compositions of the training split.
"""

from __future__ import annotations

import io
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
LEVEL, CLEAR, SLACK = 0.05, 0.4, 0.15
"""Differences of `beside`: ties have less than the first, other pairs at least the second. Drawing
moves one by less than the third."""
MISSING = -1.0
"""What a picture without one of the things is worth; the least of any picture."""

Row = dict[str, Any]


def beside(prompt: ScenePrompt | str, picture: Image) -> float:
    """How much further apart the named things are sideways than in height, in picture sides."""
    found = offset(prompt, picture)
    return MISSING if found is None else abs(found[0]) - abs(found[1])


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
        scenes = [rearrange(scene, rng) for _ in range(2)]
        # Only to save renderings that would be thrown away: a triangle's centroid lies lower.
        planned = abs(_planned(scenes[0]) - _planned(scenes[1]))
        if planned > SLACK if tie else planned < CLEAR - SLACK:
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


def _planned(scene: Scene) -> float:
    first, second = scene.objects
    return abs(first.x - second.x) - abs(first.y - second.y)


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
