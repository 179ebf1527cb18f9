"""From whatever holds an image to RGB pixels, and the geometry of resize, crop and flip."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageOps
from torch import Tensor

from alignkit.columns import BadRow

MAX_ASPECT = 32
"""An image whose sides differ by more is a bar; resizing its short side up would take gigabytes."""


def open_image(source: Any, folder: Path | None) -> Image.Image:
    """Decode to RGB, 8 bits, upright.

    Args:
        source: a path (relative ones to `folder`), bytes, ``{"bytes", "path"}`` or a PIL image.
        folder: where the data is.

    Transparency is composited on white; 16-bit values are scaled; EXIF orientation is applied.

    Raises:
        BadRow: missing, truncated, animated, or not an image.
    """
    image, name = _open(source, folder)
    if getattr(image, "is_animated", False) and image.format != "MPO":
        # An MPO is a photograph with a preview or a second lens behind it.
        frames = getattr(image, "n_frames", 0)
        raise BadRow("animated image", f"images have one frame; {name} has {frames}")
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
        rgb = _to_rgb(upright, name)
    except BadRow:
        raise
    except Exception as error:  # decoders raise all manner of errors on broken files
        raise BadRow("unreadable image", f"{name} cannot be decoded: {error}") from error
    if max(rgb.size) > MAX_ASPECT * min(rgb.size):
        raise BadRow(
            "extreme aspect ratio",
            f"an image's sides differ by at most {MAX_ASPECT} times; {name} has {rgb.width} x "
            f"{rgb.height}",
        )
    return rgb


def _open(source: Any, folder: Path | None) -> tuple[Image.Image, str]:
    name = "the image"
    if isinstance(source, Mapping):
        path = source.get("path")
        name = str(path) if path else name
        source = source.get("bytes") if source.get("bytes") is not None else path
    if isinstance(source, Image.Image):
        return source, name
    if isinstance(source, str | Path) and str(source):
        path = Path(source).expanduser()
        path = path if path.is_absolute() or folder is None else folder / path
        if not path.is_file():
            raise BadRow("missing file", f"there is no image file {path}")
        name, source = str(path), io.BytesIO(path.read_bytes())
    elif isinstance(source, bytes | bytearray | memoryview):
        name, source = f"{name} ({len(source)} bytes)", io.BytesIO(source)
    else:
        shown = "nothing" if source in (None, "") else type(source).__name__
        raise BadRow("no image", f"an image is a path, bytes or a PIL image; got {shown}")
    try:
        image = Image.open(source)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _over_large(name, str(error)) from error
    except Exception as error:
        raise BadRow("unreadable image", f"{name} is not an image: {error}") from error
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        # PIL itself only warns up to twice its limit.
        found = f"{image.width} x {image.height} are more than {limit} pixels."
        raise _over_large(name, found)
    return image, name


def _over_large(name: str, found: str) -> BadRow:
    return BadRow(
        "over-large image",
        f"{name}: {found} Make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust where "
        "it comes from.",
    )


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise BadRow("unreadable image", f"{name} has floating-point values of unknown range")
    if image.mode.startswith("I"):
        # PIL's own conversion clips at 255 what reaches to 65535.
        values = np.asarray(image).astype(np.float64)
        wide = image.mode != "I" or values.max(initial=0) > 255
        divisor = 257.0 if wide else 1.0
        image = Image.fromarray(np.clip(np.rint(values / divisor), 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return image.convert("RGB")


def digest(image: Image.Image) -> str:
    """A hash of the decoded picture: equal for the same pixels in any file format."""
    hashed = hashlib.blake2b(f"{image.width}x{image.height}".encode(), digest_size=16)
    hashed.update(image.tobytes())
    return hashed.hexdigest()


@dataclass(frozen=True)
class Augmentation:
    """What one row does to *all* its images in one epoch.

    Attributes:
        top, left: where in the free range the crop lies, 0 to 1; 1/2 is the centre. Shares, so that
            images of different sizes are cropped alike.
        flip: mirror left and right.
    """

    top: float = 0.5
    left: float = 0.5
    flip: bool = False

    @classmethod
    def drawn(cls, crop: Generator | None, flip: Generator | None) -> Augmentation:
        """From the generators of crop and flip; None leaves it out."""
        top, left = (0.5, 0.5) if crop is None else crop.random(2).tolist()
        return cls(top, left, flip is not None and bool(flip.random() < 0.5))


@dataclass(frozen=True)
class Placement:
    """How one image becomes a rectangle of the run's: flip, resize until it is covered, crop.

    Attributes:
        original: (height, width) of the image as it is, in pixels.
        resized: (height, width) after resizing.
        corner: (top, left) of the crop in the resized (and flipped) image.
        target: (height, width) of the crop.
        flip: mirrored before everything else.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]
    target: tuple[int, int]
    flip: bool

    @classmethod
    def of(
        cls, height: int, width: int, target: tuple[int, int], augmentation: Augmentation
    ) -> Placement:
        """The placement of an image of (height, width) in a rectangle of `target`."""
        scale = max(target[0] / height, target[1] / width)
        resized = (max(target[0], round(height * scale)), max(target[1], round(width * scale)))
        shares = (augmentation.top, augmentation.left)
        top, left = (
            round(share * (side - crop))
            for share, side, crop in zip(shares, resized, target, strict=True)
        )
        return cls((height, width), resized, (top, left), target, augmentation.flip)

    def time_ids(self) -> tuple[int, ...]:
        """Original height, width; crop top, left; target height, width (2307.01952, sec. 2.2)."""
        return (*self.original, *self.corner, *self.target)

    def key(self) -> bytes:
        """What a latent depends on besides the image and the VAE."""
        numbers = (*self.resized, *self.corner, *self.target, int(self.flip))
        return f"lanczos {' '.join(map(str, numbers))}".encode()

    def pixels(self, image: Image.Image) -> Tensor:
        """(3, height, width) float32 in [-1, 1]."""
        if self.flip:
            image = ImageOps.mirror(image)
        height, width = self.resized
        # PIL's filters widen when they shrink, so this does not alias.
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        (top, left), (tall, wide) = self.corner, self.target
        image = image.crop((left, top, left + wide, top + tall))
        values = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, height, width)
        return values.float() / 127.5 - 1.0
