"""The world of the tiny picture model: prompts, known reward, attribute score, preference pairs.

The **known reward** judges the relation between a prompt and a picture: the two things that the
prompt names should stand side by side, level and apart, and be large.  The **attribute score**
judges what no preference pair speaks about: are the named things there, in the right kinds and
colours, and nothing else?  Both live in :mod:`alignkit.demo.scene_judge`; this module is the
world's front.

Prompts are split by composition, the unordered pair of coloured kinds ("red circle" with "blue
square"): one third of the compositions is held out, chosen by a hash of their names.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from alignkit.demo.scene_drawing import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    PLACES,
    RELATIONS,
    SIZES,
    NamedObject,
    Scene,
    SceneObject,
    ScenePrompt,
    draw_scene,
    read_prompt,
    render,
)
from alignkit.demo.scene_judge import attribute_score, known_reward

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "KINDS",
    "PLACES",
    "RELATIONS",
    "SIZES",
    "NamedObject",
    "Scene",
    "SceneObject",
    "ScenePrompt",
    "attribute_score",
    "draw_caption",
    "draw_scene",
    "known_reward",
    "make_pairs",
    "make_prompts",
    "read_prompt",
    "render",
    "split_of",
    "write_pairs",
]

Split = Literal["train", "heldout"]

MIN_GAP = 0.1  # least difference of known reward within a preference pair

_WORDINGS = (
    "a {a} and a {b}",
    "a {a} with a {b}",
    "a {a} next to a {b}",
    "a picture of a {a} and a {b}",
    "one {a} and one {b}",
    "{a}, {b}",
)
_PLACED = (
    "a {a} on the {p} and a {b} on the {q}",
    "a {a} at the {p} and a {b} at the {q}",
)
_SINGLE = ("a {a}", "one {a}", "a picture of a {a}", "a {a} on the {p}", "a {a} at the {p}")
_OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


# --- prompts -----------------------------------------------------------------------------------


def draw_caption(rng: np.random.Generator) -> ScenePrompt:
    """A random caption of any sort, over all compositions: what the base model is trained on."""
    first, second = _two_objects(rng)
    sort = rng.choice(5, p=[0.40, 0.14, 0.14, 0.22, 0.10])
    values = {"a": first, "b": second}
    if sort == 0:
        text = str(rng.choice(_WORDINGS))
    elif sort == 1:
        text = str(rng.choice(_PLACED))
        values["p"] = str(rng.choice(PLACES))
        values["q"] = _OPPOSITE[values["p"]]
    elif sort == 2:
        text = str(rng.choice(_WORDINGS))
        values = {key: f"{rng.choice(list(SIZES))} {name}" for key, name in values.items()}
    elif sort == 3:
        text = f"a {{a}} {rng.choice(RELATIONS)} a {{b}}"
    else:
        text = str(rng.choice(_SINGLE))
        values["p"] = str(rng.choice(PLACES))
        if rng.random() < 0.5:
            values["a"] = f"{rng.choice(list(SIZES))} {first}"
    return read_prompt(text.format(**values) + _background(rng))


def make_prompts(n: int, seed: int, split: Split = "train") -> list[ScenePrompt]:
    """``n`` distinct two-object prompts of one split that leave places and sizes open."""
    rng = np.random.default_rng([seed, 0x9A9])
    found: dict[str, ScenePrompt] = {}
    for _ in range(200 * n + 1000):
        if len(found) == n:
            return list(found.values())
        prompt = _draw_open(rng, split)
        found.setdefault(prompt.text, prompt)
    raise ValueError(f"there are no {n} distinct prompts in the {split} split")


def split_of(prompt: ScenePrompt) -> Split:
    """The split that the prompt's composition belongs to."""
    names = sorted(f"{named.colour} {named.kind}" for named in prompt.objects)
    digest = hashlib.sha256("|".join(names).encode()).digest()
    return "heldout" if digest[0] % 3 == 0 else "train"


def _draw_open(rng: np.random.Generator, split: Split) -> ScenePrompt:
    while True:
        first, second = _two_objects(rng)
        wording = str(rng.choice(_WORDINGS))
        prompt = read_prompt(wording.format(a=first, b=second) + _background(rng))
        if split_of(prompt) == split:
            return prompt


def _two_objects(rng: np.random.Generator) -> tuple[str, str]:
    colours = rng.choice(list(COLOURS), size=2, replace=False)
    kinds = rng.choice(KINDS, size=2)
    return f"{colours[0]} {kinds[0]}", f"{colours[1]} {kinds[1]}"


def _background(rng: np.random.Generator) -> str:
    if rng.random() < 0.6:
        return ""
    return f" on a {rng.choice(list(BACKGROUNDS))} background"


# --- preference pairs --------------------------------------------------------------------------


def make_pairs(n: int, seed: int, split: Split = "train") -> list[dict[str, Any]]:
    """Rows of ``prompt`` (str), ``chosen`` and ``rejected`` (64 px pictures).

    Both pictures agree with the prompt; the chosen one has the higher known reward.  Pictures
    whose rewards lie closer than ``MIN_GAP`` are drawn again.
    """
    rng = np.random.default_rng([seed, 0x9A1])
    rows = []
    for _ in range(n):
        prompt = _draw_open(rng, split)
        worse, better = _two_pictures(prompt, rng)
        rows.append({"prompt": prompt.text, "chosen": better, "rejected": worse})
    return rows


def _two_pictures(prompt: ScenePrompt, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Two pictures of the prompt in rising order of known reward."""
    while True:
        pictures = [
            render(draw_scene(prompt, rng), seed=int(rng.integers(2**31))) for _ in range(2)
        ]
        rewards = [known_reward(prompt, picture) for picture in pictures]
        if abs(rewards[0] - rewards[1]) >= MIN_GAP:
            return pictures[int(np.argmin(rewards))], pictures[int(np.argmax(rewards))]


def write_pairs(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the pictures as PNG files beside a ``metadata.jsonl`` that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for index, row in enumerate(rows):
            named = {side: f"{index:05d}_{side}.png" for side in ("chosen", "rejected")}
            for side, name in named.items():
                row[side].save(folder / name)
            lines.write(json.dumps({"prompt": row["prompt"], **named}) + "\n")
