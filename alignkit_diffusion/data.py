"""Image rows as prepared examples: latents and prompt embeddings, encoded once.

A training step then runs the UNet and nothing else. Augmentation is keyed by (seed, epoch, row):
the crop, flip and caption dropout of a row are the same for all of its images.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from alignkit.batches import Batch
from alignkit.columns import Sieve
from alignkit.draws import generator
from alignkit.errors import DataError
from alignkit.labels import Labels
from alignkit.options import ImageOptions
from alignkit.rows import Rows
from alignkit_diffusion.autoencoder import Autoencoder
from alignkit_diffusion.conditioning import PromptTable
from alignkit_diffusion.content import ImageContent
from alignkit_diffusion.families import Family
from alignkit_diffusion.images import Augmentation, Placement
from alignkit_diffusion.pictures import Picture, reopen, where
from alignkit_diffusion.rows import ImageRow, open_rows, read_examples

AUGMENTED_BYTES = 4 * 2**30
"""Memory for latents of random crops and flips; the least recently used are encoded again."""

Variant = tuple[str, Placement]
"""Content hash and placement: what a latent depends on."""


class LatentStore:
    """Latents by content and placement, so that an image in many rows is encoded once.

    Args:
        autoencoder: encodes.
        rows: where an image is decoded again when a new variant of it is asked for.
        limit: bytes to keep; None keeps all.
    """

    def __init__(self, autoencoder: Autoencoder, rows: Rows, limit: int | None) -> None:
        self._autoencoder = autoencoder
        self._rows = rows
        self._limit = limit
        self._bytes = 0
        self._latents: OrderedDict[Variant, Tensor] = OrderedDict()
        self._queue: dict[Variant, tuple[Picture, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._latents)

    def queue(self, picture: Picture, placement: Placement, image: Image) -> None:
        """Encode in a batch with others, soon; `flush` ends it."""
        variant = (picture.digest, placement)
        if variant in self._latents or variant in self._queue:
            return
        self._queue[variant] = (picture, placement.pixels(image))
        if len(self._queue) >= self._autoencoder.batch_size(placement.size, placement.size):
            self.flush()

    def flush(self) -> None:
        """Encode what is queued."""
        if not self._queue:
            return
        pixels = torch.stack([pixels for _, pixels in self._queue.values()])  # (N, 3, H, W)
        encoded = self._autoencoder.encode(pixels)  # (N, C, h, w)
        for (variant, (picture, _)), latents in zip(self._queue.items(), encoded, strict=True):
            if not bool(torch.isfinite(latents).all()):
                raise DataError(
                    f"Latents must be finite; {where(self._rows, picture)} gave NaN or infinity. "
                    "Look at the image, and at the weights of the pipeline's VAE."
                )
            self._keep(variant, latents.clone())
        self._queue.clear()

    def get(self, picture: Picture, placement: Placement) -> Tensor:
        """(C, h, w) float32. A new variant is encoded alone, so that no batch changes its bits."""
        variant = (picture.digest, placement)
        if variant not in self._latents:
            self.queue(picture, placement, reopen(self._rows, picture))
            self.flush()
        self._latents.move_to_end(variant)
        return self._latents[variant]

    def _keep(self, variant: Variant, latents: Tensor) -> None:
        self._latents[variant] = latents
        self._bytes += latents.nbytes
        while self._limit is not None and self._bytes > self._limit and len(self._latents) > 1:
            _, oldest = self._latents.popitem(last=False)
            self._bytes -= oldest.nbytes


class ImageExamples:
    """Prepared rows: the `Examples` of this wing.

    Attributes:
        skipped: reason -> rows left out by the options.
    """

    def __init__(
        self,
        rows: Sequence[ImageRow],
        latents: LatentStore,
        prompts: PromptTable,
        options: ImageOptions,
        *,
        seed: int,
        skipped: Mapping[str, int],
    ) -> None:
        self.skipped = dict(skipped)
        self._rows = list(rows)
        self.labels = Labels([row.number for row in rows], [row.label for row in rows])
        self._latents = latents
        self._prompts = prompts
        self._options = options
        self._seed = seed

    def __len__(self) -> int:
        return len(self._rows)

    def collate(self, indices: Sequence[int], epochs: Sequence[int]) -> Batch:
        """The given rows as a batch; of a tied pair both ranks are 0."""
        rows = [self._rows[index] for index in indices]
        prompts = [
            None if self._drops_caption(row, epoch) else row.prompt
            for row, epoch in zip(rows, epochs, strict=True)
        ]
        latents, geometry = [], []
        for row, epoch in zip(rows, epochs, strict=True):
            augmentation = augment(self._options, self._seed, epoch, row.number)
            for picture in row.pictures:
                placement = place(picture, self._options, augmentation)
                latents.append(self._latents.get(picture, placement))
                geometry.append(placement.time_ids())
        content = ImageContent(
            tuple(latents),
            torch.tensor(geometry, dtype=torch.float32).reshape(len(latents), 6),
            self._prompts.look_up(prompts),
        )
        return self.labels.batch(content, indices)

    def mismatched(self, indices: Sequence[int]) -> list[int]:
        return self.labels.mismatched(indices, [self._rows[index].prompt for index in indices])

    def _drops_caption(self, row: ImageRow, epoch: int) -> bool:
        share = self._options.caption_dropout
        return share > 0 and generator("caption", self._seed, epoch, row.number).random() < share


def augment(options: ImageOptions, seed: int, epoch: int, row: int) -> Augmentation:
    """What a row does to all its images in an epoch."""
    key = (seed, epoch, row)
    crop = generator("crop", *key) if options.crop == "random" else None
    flip = generator("flip", *key) if options.flip else None
    return Augmentation.drawn(crop, flip)


def place(picture: Picture, options: ImageOptions, augmentation: Augmentation) -> Placement:
    """How an image becomes a square of the run's resolution, from its own size."""
    assert options.resolution is not None
    return Placement.of(picture.height, picture.width, options.resolution, augmentation)


def prepare_examples(
    data: Any,
    options: ImageOptions,
    *,
    kind: str,
    pipe: Any,
    family: Family,
    autoencoder: Autoencoder,
    device: torch.device,
    seed: int,
) -> ImageExamples:
    """Read, check and encode image rows.

    Without random crops and flips every image is encoded here, and the VAE is done; with them, a
    variant is encoded when its epoch first needs it.

    Raises:
        ConfigError: a renamed column is not one of image rows.
        DataError: see `rows.open_rows` and `rows.read_examples`; or no row is usable.
    """
    opened = open_rows(data, options, kind)
    fixed = options.crop == "center" and not options.flip
    latents = LatentStore(autoencoder, opened, None if fixed else AUGMENTED_BYTES)
    sieve = Sieve(opened, options.on_bad_row)

    def on_image(picture: Picture, image: Image) -> None:
        if fixed:
            latents.queue(picture, place(picture, options, Augmentation()), image)

    rows = list(read_examples(opened, kind, options, sieve, on_image))
    latents.flush()
    sieve.warn()
    if not rows:
        raise DataError(
            f"Data must hold at least one usable row; {opened.name} has none. Left out: "
            f"{dict(sieve.skipped)}."
        )
    prompts = PromptTable(pipe, family, (row.prompt for row in rows), device)
    if fixed:
        autoencoder.release()
    return ImageExamples(rows, latents, prompts, options, seed=seed, skipped=sieve.skipped)


def distinct_prompts(data: Any, options: ImageOptions, limit: int) -> list[str]:
    """The first `limit` distinct prompts of the data; rows without one are passed over."""
    found: dict[str, None] = {}
    for row in open_rows(data, options):
        if len(found) >= limit:
            break
        prompt = row.get("prompt", row.get("caption"))
        if isinstance(prompt, str):
            found[prompt] = None
    return list(found)
