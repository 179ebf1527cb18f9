"""Which shape the images of a row take, and which part of each of them is seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from alignkit.draws import generator
from alignkit.errors import ConfigError
from alignkit.options import ImageOptions
from alignkit_diffusion.buckets import Shape, bucket_list, nearest_bucket
from alignkit_diffusion.images import Augmentation, Placement
from alignkit_diffusion.pictures import Picture


class Geometry:
    """The shapes and crops of a data set under its options.

    Attributes:
        shapes: that images can take, (height, width) in pixels.
        fixed: the augmentations there are, where there are few of them; None with random crops.
    """

    def __init__(self, options: ImageOptions) -> None:
        assert options.resolution is not None
        self._options = options
        side = options.resolution
        self.shapes: Sequence[Shape] = ((side, side),)
        if options.buckets:
            self.shapes = bucket_list(side, options.bucket_step)
        both = (Augmentation(), Augmentation(flip=True))
        self.fixed = None if options.crop == "random" else both[: 2 if options.flip else 1]

    def augmentation(self, seed: int, epoch: int, row: int) -> Augmentation:
        """What a row does to all its images in an epoch."""
        key = (seed, epoch, row)
        crop = generator("crop", *key) if self._options.crop == "random" else None
        flip = generator("flip", *key) if self._options.flip else None
        return Augmentation.drawn(crop, flip)

    def placements(
        self, pictures: Sequence[Picture], augmentation: Augmentation
    ) -> list[Placement]:
        """Of the images of one row: one shape for all, each resized from its own size."""
        sizes = [(picture.height, picture.width) for picture in pictures]
        target = self.shapes[0] if len(self.shapes) == 1 else nearest_bucket(sizes, self.shapes)
        return [Placement.of(*size, target, augmentation) for size in sizes]


def checked(options: ImageOptions, native: int, unit: int) -> ImageOptions:
    """The options with a resolution that this pipeline can take.

    Args:
        options: as given.
        native: pixels that the UNet was trained for.
        unit: what sides must be multiples of.

    Raises:
        ConfigError: resolution or bucket_step are no multiples of it, or no shape is left.
    """
    asked = options.resolution
    if asked is None:
        asked = native
    elif asked % unit and not options.buckets:
        raise ConfigError(
            f"data_options.resolution must be a multiple of {unit} pixels for this "
            f"pipeline (VAE times UNet levels); got {asked}. Take {_nearest(asked, unit)}; this "
            f"UNet was trained for {native}."
        )
    if options.buckets and options.bucket_step % unit:
        raise ConfigError(
            f"data_options.bucket_step must be a multiple of {unit} pixels for this pipeline (VAE "
            f"times UNet levels); got {options.bucket_step}. Take "
            f"{_nearest(options.bucket_step, unit)}."
        )
    if options.buckets and not bucket_list(asked, options.bucket_step):
        raise ConfigError(
            f"data_options.buckets finds no shape of about {asked} x {asked} pixels in steps of "
            f"{options.bucket_step}. Take a smaller bucket_step, a multiple of {unit}."
        )
    return replace(options, resolution=asked)


def _nearest(value: int, unit: int) -> int:
    return max(unit, round(value / unit) * unit)
