"""Judging pictures of the tiny world: the known reward and the attribute score.

Both measure the picture itself.  A pixel belongs to the colour of the nearest hue when it is at
least half as strong as that colour, so soft edges and small tints do not matter; objects are then
compared by centroid and area, and kinds by overlap with ideal shapes.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alignkit.demo.scene_drawing import (
    BACKGROUNDS,
    COLOURS,
    HALF_BOX,
    KINDS,
    ScenePrompt,
    read_prompt,
)

Mask = NDArray[np.bool_]

LEVEL = 0.25  # a difference of heights, in picture heights, that earns nothing any more
APART = 0.45  # a sideways distance, in picture widths, that earns all there is
AREAS = (0.03, 0.09)  # shares of the picture between which size is graded
MIN_AREA = 0.0125  # of the picture; a small object covers at least 0.03
MIN_FIT = 0.6  # overlap with the ideal shape below which an object has no kind


def known_reward(prompt: ScenePrompt | str, image: Image.Image) -> float:
    """How well the picture presents the two things that the prompt names, from 0 to 1.

    The mean of three grades of the *named* objects, found by the colours that the prompt gives
    them: level (their centroids at one height), apart (far from each other sideways), and large
    (the smaller of the two counts). 0 when a named object is not there. What else is in the
    picture earns nothing, so the same picture is worth something else under another prompt.
    """
    prompt = read_prompt(prompt) if isinstance(prompt, str) else prompt
    masks = _colour_masks(image)
    seen = [masks[named.colour] for named in prompt.objects]
    if len(seen) != 2 or any(mask.mean() < MIN_AREA for mask in seen):
        return 0.0
    (x, y), (other_x, other_y) = (_centroid(mask) for mask in seen)
    smaller = min(float(mask.mean()) for mask in seen)
    grades = (
        1 - abs(y - other_y) / LEVEL,
        abs(x - other_x) / APART,
        (smaller - AREAS[0]) / (AREAS[1] - AREAS[0]),
    )
    return float(np.mean(np.clip(grades, 0, 1)))


def offset(prompt: ScenePrompt | str, image: Image.Image) -> tuple[float, float] | None:
    """From the first named object's centroid to the second's: to the right and down, in widths and
    heights of the picture. None where one of the two is not there."""
    prompt = read_prompt(prompt) if isinstance(prompt, str) else prompt
    masks = _colour_masks(image)
    seen = [masks[named.colour] for named in prompt.objects]
    if len(seen) != 2 or any(mask.mean() < MIN_AREA for mask in seen):
        return None
    (x, y), (other_x, other_y) = (_centroid(mask) for mask in seen)
    return float(other_x - x), float(other_y - y)


def attribute_score(prompt: ScenePrompt | str, image: Image.Image) -> float:
    """The share of the prompt's attributes, other than the judged relations, that the picture has.

    One check each for every named object's colour being there and its kind being right, one that
    no other colour is there, and one for a named background and a named vertical relation.
    """
    prompt = read_prompt(prompt) if isinstance(prompt, str) else prompt
    masks = _colour_masks(image)
    there = {colour: bool(mask.mean() >= MIN_AREA) for colour, mask in masks.items()}
    named_colours = [named.colour for named in prompt.objects]
    checks = [there[colour] for colour in named_colours]
    checks += [_kind_seen(masks[item.colour]) == item.kind for item in prompt.objects]
    checks.append(not any(there[colour] for colour in COLOURS if colour not in named_colours))
    if prompt.background:
        checks.append(_background_seen(image, masks) == prompt.background)
    if prompt.relation in ("above", "below"):
        heights = [_centroid(masks[colour])[1] for colour in named_colours]
        checks.append((heights[0] < heights[1]) == (prompt.relation == "above"))
    return float(np.mean(checks))


def _hue_chroma(
    pixels: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Hue in degrees and chroma (0..255).  Blending with white, grey or black keeps the hue."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    hue = np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360
    return hue, pixels.max(-1) - pixels.min(-1)


def _colour_masks(image: Image.Image) -> dict[str, Mask]:
    """Per colour, the pixels of the nearest hue that are at least half as strong as the colour."""
    hue, chroma = _hue_chroma(np.asarray(image.convert("RGB"), dtype=np.float64))
    ideal_hue, ideal_chroma = _hue_chroma(np.array(list(COLOURS.values()), dtype=np.float64))
    apart = np.abs((hue[..., None] - ideal_hue + 180) % 360 - 180)
    nearest = apart.argmin(-1)
    strong = chroma >= ideal_chroma[nearest] / 2
    return {colour: (nearest == i) & strong for i, colour in enumerate(COLOURS)}


def _centroid(mask: Mask) -> tuple[float, float]:
    """Mean x and y of the pixels as fractions of the picture; the middle for an empty mask."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return 0.5, 0.5
    return (columns.mean() + 0.5) / mask.shape[1], (rows.mean() + 0.5) / mask.shape[0]


def _kind_seen(mask: Mask) -> str | None:
    """The kind whose ideal shape of this centroid and area overlaps the pixels best."""
    if mask.mean() < MIN_AREA:
        return None
    fits = {kind: _overlap(mask, _ideal(kind, mask)) for kind in KINDS}
    best = max(fits, key=lambda kind: fits[kind])
    return best if fits[best] >= MIN_FIT else None


def _ideal(kind: str, mask: Mask) -> Mask:
    height, width = mask.shape
    x, y = _centroid(mask)
    half = HALF_BOX[kind] * np.sqrt(mask.mean() / np.pi)
    rows, columns = np.mgrid[:height, :width]
    across = ((columns + 0.5) / width - x) / half
    down = ((rows + 0.5) / height - y) / half
    if kind == "circle":
        return across**2 + down**2 <= 1
    if kind == "square":
        return (np.abs(across) <= 1) & (np.abs(down) <= 1)
    # A triangle's centroid lies a third of its height above the base.
    return (down <= 2 / 3) & (np.abs(across) <= (down + 4 / 3) / 2)


def _overlap(left: Mask, right: Mask) -> float:
    return float((left & right).sum() / max((left | right).sum(), 1))


def _background_seen(image: Image.Image, masks: dict[str, Mask]) -> str:
    """The named background nearest to the median of the uncoloured pixels."""
    plain = ~np.any(list(masks.values()), axis=0)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)[plain]
    shade = float(np.median(pixels)) if len(pixels) else 0.0
    return min(BACKGROUNDS, key=lambda name: abs(BACKGROUNDS[name][0] - shade))
