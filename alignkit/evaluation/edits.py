"""Before and after of edited pictures, strength by strength: image-to-image and inpainting."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from alignkit.capabilities import EditsPictures
from alignkit.errors import ConfigError, DataError
from alignkit.evaluation.answers import Answers, Side
from alignkit.evaluation.likelihoods import Measures
from alignkit.facts import EvaluationRow
from alignkit.options import GenerationOptions
from alignkit.protocols import Reward
from alignkit.scoring import Rows, scores_of
from alignkit.statistics import preference_rate, preferences

MOST = 8
"""Prompts whose pictures are edited."""


@dataclass(frozen=True)
class Strip:
    """One prompt's pictures.

    Attributes:
        prompt: the prompt.
        way: "image to image" or "inpainting".
        source: the picture that was there; of inpainting with its mask marked.
        rows: side -> one picture per strength.
    """

    prompt: str
    way: str
    source: Any
    rows: Mapping[str, list[Any]]


def edit_strips(
    answers: Answers,
    model: Side,
    opponent: Side | None,
    strengths: Sequence[float],
    options: GenerationOptions,
    seed: int,
) -> list[Strip]:
    """Edit pictures by both sides, from the same noise.

    The pictures are those of the column `image`, the masks those of `mask` (white is filled anew);
    rows without take the opponent's own picture for the prompt, and a mask of its centre.

    Raises:
        ConfigError: the model edits no pictures, or a strength is impossible.
        DataError: a picture cannot be opened.
    """
    if not isinstance(model.wing, EditsPictures):
        raise ConfigError("edit is for diffusion pipelines; this model answers in text.")
    rows = answers.rows[:MOST]
    prompts = [row["prompt"] for row in rows]
    drawn = answers.before or answers.after
    sources = [_opened(row, "image") or drawn[place] for place, row in enumerate(rows)]
    masks = [_opened(row, "mask") or centre(one) for row, one in zip(rows, sources, strict=True)]
    found: dict[str, dict[str, list[list[Any]]]] = {"image to image": {}, "inpainting": {}}
    for side in (opponent, model):
        if side is None or not isinstance(side.wing, EditsPictures):
            continue
        wing = side.wing
        with ExitStack() as stack:
            stack.enter_context(side.switched())
            for strength in strengths:
                how: dict[str, Any] = {"strength": strength, "seed": seed}
                made = {
                    "image to image": wing.edit(prompts, sources, options, **how),
                    "inpainting": wing.inpaint(prompts, sources, masks, options, **how),
                }
                for way, pictures in made.items():
                    found[way].setdefault(side.name, []).append(pictures)
    marked = [_marked(one, mask) for one, mask in zip(sources, masks, strict=True)]
    return [
        Strip(
            prompt,
            way,
            (sources if way == "image to image" else marked)[place],
            {name: [made[place] for made in by_strength] for name, by_strength in sides.items()},
        )
        for way, sides in found.items()
        for place, prompt in enumerate(prompts)
    ]


def edit_measures(
    strips: Sequence[Strip],
    rows: Rows,
    strengths: Sequence[float],
    sides: tuple[str, str],
    reward: Reward,
    name: str,
    **how: Any,
) -> Measures:
    """Win rates of the second side's edited pictures, by way and strength.

    Args:
        strips: of `edit_strips`.
        rows: of the prompts.
        strengths: that were asked for.
        sides: names of the opponent and the model.
        reward: scores pictures; name: what it is called.
        how: confidence, resamples and seed of the intervals.
    """
    measures: Measures = {}
    for way in dict.fromkeys(strip.way for strip in strips):
        own = [strip for strip in strips if strip.way == way]
        asked, prompts = rows[: len(own)], [strip.prompt for strip in own]
        for place, strength in enumerate(strengths):
            scores = [
                scores_of(reward, name, prompts, [one.rows[side][place] for one in own], asked)[""]
                for side in sides
            ]
            rate = preference_rate(preferences(*scores), prompts=prompts, **how)
            words = f"win rate of {way} at strength {strength:g}, by {name}"
            key = f"win_rate/{way.replace(' ', '_')}_{strength:g}"
            measures[key] = EvaluationRow.of(words, rate)
    return measures


def centre(picture: Any) -> Any:
    """A mask of the middle half of each side."""
    width, height = picture.size
    mask = Image.new("L", picture.size, 0)
    box = (width // 4, height // 4, width - width // 4 - 1, height - height // 4 - 1)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


def _opened(row: Mapping[str, Any], column: str) -> Any:
    """A picture of a row: PIL, bytes, a path, or as `datasets` hands it over; None without one."""
    given = row.get(column)
    if given is None or given == "" or isinstance(given, Image.Image):
        return given or None
    if isinstance(given, Mapping):
        given = given.get("bytes") or given.get("path")
    try:
        if isinstance(given, bytes):
            return Image.open(io.BytesIO(given)).convert("RGB")
        with Image.open(Path(row.get("folder") or ".") / str(given)) as opened:
            return opened.convert("RGB")
    except (OSError, TypeError) as error:
        raise DataError(
            f"The {column} of the prompt {row['prompt']!r} cannot be opened: {error}."
        ) from error


def _marked(picture: Any, mask: Any) -> Any:
    """The picture with its mask in grey, for the page."""
    grey = Image.new("RGB", picture.size, (128, 128, 128))
    return Image.composite(grey, picture.convert("RGB"), mask.convert("L").resize(picture.size))
