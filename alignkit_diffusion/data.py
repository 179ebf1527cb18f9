"""Preference pairs of images as prepared examples: latents and prompt embeddings, encoded once.

A training step then runs the UNet and nothing else. Augmentation is keyed by (seed, epoch, row):
the crop, flip and caption dropout of a row are the same for both of its images.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from alignkit.batches import Batch
from alignkit.draws import generator
from alignkit.errors import DataError
from alignkit.options import ImageOptions
from alignkit.rows import Rows
from alignkit_diffusion.autoencoder import Autoencoder
from alignkit_diffusion.conditioning import PromptTable
from alignkit_diffusion.content import ImageContent
from alignkit_diffusion.families import Family
from alignkit_diffusion.images import Augmentation, Placement
from alignkit_diffusion.pairs import Pair, Picture, open_rows, read_pairs, reopen, where

logger = logging.getLogger(__name__)

AUGMENTED_BYTES = 4 * 2**30
"""Memory for latents of random crops and flips; the least recently used are encoded again."""

Variant = tuple[str, Placement]
"""Content hash and placement: what a latent depends on."""


class LatentStore:
    """Latents by content and placement, so that an image in many pairs is encoded once.

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


class ImagePairs:
    """Prepared pairs: the `Examples` of this wing.

    Attributes:
        skipped: reason -> rows left out by the options.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        latents: LatentStore,
        prompts: PromptTable,
        options: ImageOptions,
        *,
        seed: int,
        skipped: Counter[str],
    ) -> None:
        self.skipped = dict(skipped)
        self._pairs = list(pairs)
        self._latents = latents
        self._prompts = prompts
        self._options = options
        self._seed = seed
        self._has_weight = any(pair.weight is not None for pair in pairs)
        self._has_margin = any(pair.margin is not None for pair in pairs)
        self._has_p_chosen = any(pair.p_chosen is not None for pair in pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def collate(self, indices: Sequence[int], epochs: Sequence[int]) -> Batch:
        """The given pairs as a batch of groups of two, chosen first; both ranks are 0 in a tie."""
        pairs = [self._pairs[index] for index in indices]
        prompts = [
            None if self._drops_caption(pair, epoch) else pair.prompt
            for pair, epoch in zip(pairs, epochs, strict=True)
        ]
        latents, geometry = [], []
        for pair, epoch in zip(pairs, epochs, strict=True):
            augmentation = augment(self._options, self._seed, epoch, pair.row)
            for picture in (pair.chosen, pair.rejected):
                placement = place(picture, self._options, augmentation)
                latents.append(self._latents.get(picture, placement))
                geometry.append(placement.time_ids())
        num = len(pairs)
        return Batch(
            content=ImageContent(
                tuple(latents),
                torch.tensor(geometry, dtype=torch.float32).reshape(2 * num, 6),
                self._prompts.look_up(prompts),
            ),
            group=torch.arange(num).repeat_interleave(2),
            rank=torch.tensor(
                [rank for pair in pairs for rank in (0, 0 if pair.tie else 1)], dtype=torch.int64
            ),
            position=torch.arange(num),
            row_id=torch.tensor([pair.row for pair in pairs], dtype=torch.int64),
            weight=_numbers(self._has_weight, [pair.weight for pair in pairs], 1.0),
            target_margin=_numbers(self._has_margin, [pair.margin for pair in pairs], 0.0),
            p_chosen=_numbers(self._has_p_chosen, [pair.p_chosen for pair in pairs], 1.0),
        )

    def _drops_caption(self, pair: Pair, epoch: int) -> bool:
        share = self._options.caption_dropout
        return share > 0 and generator("caption", self._seed, epoch, pair.row).random() < share


def _numbers(present: bool, values: Sequence[float | None], default: float) -> Tensor | None:
    if not present:
        return None
    return torch.tensor([default if v is None else v for v in values], dtype=torch.float32)


def augment(options: ImageOptions, seed: int, epoch: int, row: int) -> Augmentation:
    """What a row does to both of its images in an epoch."""
    key = (seed, epoch, row)
    crop = generator("crop", *key) if options.crop == "random" else None
    flip = generator("flip", *key) if options.flip else None
    return Augmentation.drawn(crop, flip)


def place(picture: Picture, options: ImageOptions, augmentation: Augmentation) -> Placement:
    """How an image becomes a square of the run's resolution, from its own size."""
    return Placement.of(picture.height, picture.width, options.resolution, augmentation)


def prepare_pairs(
    data: Any,
    options: ImageOptions,
    *,
    pipe: Any,
    family: Family,
    autoencoder: Autoencoder,
    device: torch.device,
    seed: int,
) -> ImagePairs:
    """Read, check and encode image pairs.

    Without random crops and flips every image is encoded here, and the VAE is done; with them, a
    variant is encoded when its epoch first needs it.

    Raises:
        ConfigError: a renamed column is not one of image rows.
        DataError: see `pairs.open_rows` and `pairs.read_pairs`; or no row is usable.
    """
    rows = open_rows(data, options)
    fixed = options.crop == "center" and not options.flip
    latents = LatentStore(autoencoder, rows, None if fixed else AUGMENTED_BYTES)
    skipped: Counter[str] = Counter()

    def on_image(picture: Picture, image: Image) -> None:
        if fixed:
            latents.queue(picture, place(picture, options, Augmentation()), image)

    pairs = list(read_pairs(rows, options, skipped, on_image))
    latents.flush()
    if skipped:
        listed = ", ".join(f"{reason}: {count}" for reason, count in sorted(skipped.items()))
        logger.warning("Left out %d of %d rows (%s).", skipped.total(), len(rows), listed)
    if not pairs:
        raise DataError(
            f"Data must hold at least one usable pair; {rows.name} has none. Left out: "
            f"{dict(skipped)}."
        )
    prompts = PromptTable(pipe, family, (pair.prompt for pair in pairs), device)
    if fixed:
        autoencoder.release()
    return ImagePairs(pairs, latents, prompts, options, seed=seed, skipped=skipped)


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
