"""Scenes of the tiny picture world: what a caption says, and pictures that agree with it.

A scene holds one or two plain shapes on a plain background.  A caption names some attributes
(colour and kind always; size, place, relation and background sometimes) and leaves the others
open; :func:`draw_scene` draws the open ones at random, so pictures of one caption differ exactly
in what the caption does not say.  Everything is a pure function of its arguments and seeds.

All lengths are fractions of the picture's side, with y growing downwards.
"""

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (40, 84, 214),
    "yellow": (242, 200, 30),
    "purple": (142, 54, 186),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (244, 244, 244),
    "grey": (150, 150, 150),
    "black": (26, 26, 26),
}
KINDS = ("circle", "square", "triangle")
SIZES: dict[str, tuple[float, float]] = {"small": (0.10, 0.12), "large": (0.15, 0.18)}
PLACES = ("left", "right", "top", "bottom")
RELATIONS = ("left of", "right of", "above", "below", "larger than", "smaller than")

# Half the side of each kind's bounding box when its area is that of a circle of radius 1:
# objects of the same radius cover the same area, whatever their kind.
HALF_BOX = {
    "circle": 1.0,
    "square": float(np.sqrt(np.pi)) / 2,
    "triangle": float(np.sqrt(np.pi / 2)),
}
_GAP = 0.03  # free space around every object
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class SceneObject:
    """One shape; ``radius`` is that of the circle of equal area."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def half_box(self) -> float:
        """Half the side of the bounding box."""
        return HALF_BOX[self.kind] * self.radius

    @property
    def size(self) -> str:
        """The nearer of the named sizes."""
        return min(SIZES, key=lambda name: abs(sum(SIZES[name]) / 2 - self.radius))


@dataclass(frozen=True)
class Scene:
    """One or two objects of different colours on a plain background."""

    objects: tuple[SceneObject, ...]
    background: str


@dataclass(frozen=True)
class NamedObject:
    """What a caption says about one object; ``None`` is left open."""

    kind: str
    colour: str
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class ScenePrompt:
    """A caption and its facts: objects in the order named, a relation of the first to the second.

    ``kind`` is the sort of caption: "single", "open" (two objects, nothing said about their
    relation), "placed", "sized" or "related".
    """

    text: str
    kind: str
    objects: tuple[NamedObject, ...]
    relation: str | None = None
    background: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> "ScenePrompt":
        """The inverse of :meth:`to_dict`."""
        objects = tuple(NamedObject(**named) for named in row["objects"])
        return cls(**{**row, "objects": objects})


_MENTION = re.compile(
    rf"(?:\b({'|'.join(SIZES)}) )?\b({'|'.join(COLOURS)}) ({'|'.join(KINDS)})\b", re.IGNORECASE
)
_PLACE = re.compile(rf"\b(?:on|at) the ({'|'.join(PLACES)})\b", re.IGNORECASE)
_RELATION = re.compile(rf"\b({'|'.join(RELATIONS)})\b", re.IGNORECASE)
_BACKGROUND = re.compile(rf"\b({'|'.join(BACKGROUNDS)}) background\b", re.IGNORECASE)


def read_prompt(text: str) -> ScenePrompt:
    """The facts of a caption written in this world's words; ValueError when it names no object."""
    mentions = list(_MENTION.finditer(text))
    if not mentions:
        raise ValueError(f"no coloured shape is named in {text!r}")
    ends = [mention.start() for mention in mentions[1:]] + [len(text)]
    objects = []
    for mention, end in zip(mentions, ends, strict=True):
        size, colour, shape = (group and group.lower() for group in mention.groups())
        place = _first(_PLACE, text[mention.end() : end])
        objects.append(NamedObject(shape, colour, size, place))
    relation = _first(_RELATION, text[mentions[0].end() : ends[0]]) if len(mentions) > 1 else None
    kind = _prompt_kind(objects, relation)
    return ScenePrompt(text, kind, tuple(objects), relation, _first(_BACKGROUND, text))


def _first(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.search(text)
    return found.group(1).lower() if found else None


def _prompt_kind(objects: list[NamedObject], relation: str | None) -> str:
    if len(objects) == 1:
        return "single"
    if relation:
        return "related"
    if any(named.place for named in objects):
        return "placed"
    return "sized" if any(named.size for named in objects) else "open"


def draw_scene(prompt: ScenePrompt, rng: np.random.Generator) -> Scene:
    """A scene that agrees with the caption, with everything it leaves open drawn at random."""
    background = prompt.background or str(rng.choice(list(BACKGROUNDS)))
    for _ in range(10_000):
        objects = tuple(_draw_object(named, rng) for named in prompt.objects)
        if _apart(objects) and _related(objects, prompt.relation):
            return Scene(objects, background)
    raise ValueError(f"no scene agrees with {prompt.text!r}")


def rearrange(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same things, as large as before and on the same background, at other places."""
    for _ in range(10_000):
        lows = [item.half_box + _GAP for item in scene.objects]
        places = [rng.uniform(low, 1 - low, size=2).tolist() for low in lows]
        moved = tuple(
            replace(item, x=x, y=y) for item, (x, y) in zip(scene.objects, places, strict=True)
        )
        if _apart(moved):
            return replace(scene, objects=moved)
    raise ValueError(f"the objects of {scene} do not fit beside each other")


def _draw_object(named: NamedObject, rng: np.random.Generator) -> SceneObject:
    size = named.size or ("small", "large")[rng.integers(2)]
    radius = rng.uniform(*SIZES[size])
    low = HALF_BOX[named.kind] * radius + _GAP
    x, y = rng.uniform(low, 1 - low, size=2)
    # A named place is the outer part of the picture, clearly off the middle.
    if named.place in ("left", "right"):
        x = rng.uniform(low, max(low, 0.34))
        x = x if named.place == "left" else 1 - x
    if named.place in ("top", "bottom"):
        y = rng.uniform(low, max(low, 0.34))
        y = y if named.place == "top" else 1 - y
    return SceneObject(named.kind, named.colour, float(x), float(y), float(radius))


def _apart(objects: tuple[SceneObject, ...]) -> bool:
    if len(objects) < 2:
        return True
    first, second = objects
    reach = first.half_box + second.half_box + _GAP
    return max(abs(first.x - second.x), abs(first.y - second.y)) > reach


def _related(objects: tuple[SceneObject, ...], relation: str | None) -> bool:
    """Whether the relation holds by a visible margin."""
    if relation is None:
        return True
    first, second = objects
    growth = {
        "left of": second.x - first.x,
        "right of": first.x - second.x,
        "above": second.y - first.y,
        "below": first.y - second.y,
        "larger than": 6 * (first.radius - second.radius),
        "smaller than": 6 * (second.radius - first.radius),
    }
    return growth[relation] > 0.15


def render(scene: Scene, size: int = 64, seed: int = 0) -> Image.Image:
    """The antialiased picture of a scene; ``seed`` moves, scales and tints it a little."""
    rng = np.random.default_rng([seed, 0x5CE])
    paper = _tint(BACKGROUNDS[scene.background], rng)
    picture = Image.new("RGB", (size * _SUPERSAMPLING,) * 2, paper)
    pen = ImageDraw.Draw(picture)
    for item in scene.objects:
        x, y = np.array([item.x, item.y]) + rng.uniform(-0.005, 0.005, size=2)
        half = item.half_box * rng.uniform(0.98, 1.02)
        corners = np.array([x - half, y - half, x + half, y + half]) * size * _SUPERSAMPLING
        _draw_shape(pen, item.kind, corners.tolist(), _tint(COLOURS[item.colour], rng))
    return picture.resize((size, size), Image.Resampling.BOX)


def _draw_shape(
    pen: ImageDraw.ImageDraw, kind: str, box: list[float], colour: tuple[int, int, int]
) -> None:
    left, top, right, bottom = box
    if kind == "circle":
        pen.ellipse((left, top, right, bottom), fill=colour)
    elif kind == "square":
        pen.rectangle((left, top, right, bottom), fill=colour)
    else:
        pen.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=colour)


def _tint(colour: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(c) for c in np.clip(np.array(colour) + rng.integers(-4, 5), 0, 255))
    return red, green, blue
