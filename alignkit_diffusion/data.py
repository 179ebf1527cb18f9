"""Image rows as prepared examples: latents and prompt embeddings, encoded once.

A training step then runs the UNet and nothing else. Augmentation is keyed by (seed, epoch, row):
the crop, flip and caption dropout of a row are the same for all of its images.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from tqdm.auto import tqdm

from alignkit.batches import Batch
from alignkit.columns import Sieve
from alignkit.draws import generator
from alignkit.errors import DataError
from alignkit.labels import Labels
from alignkit.options import ImageOptions
from alignkit.rows import Rows
from alignkit.splits import in_part
from alignkit_diffusion.autoencoder import Autoencoder
from alignkit_diffusion.conditioning import PromptTable
from alignkit_diffusion.content import ImageContent
from alignkit_diffusion.families import Family
from alignkit_diffusion.geometry import Geometry
from alignkit_diffusion.images import Placement
from alignkit_diffusion.pictures import Picture, reopen, where
from alignkit_diffusion.rows import ImageRow, Prepare, open_rows, read_examples

AUGMENTED_BYTES = 4 * 2**30
"""Memory for latents of random crops and flips; the least recently used are encoded again."""

Variant = tuple[str, Placement]
"""Content hash and placement: what a latent depends on."""

Posterior = tuple[Tensor, Tensor | None]
"""Mean and standard deviation (C, h, w) of an image's latent; the latter only if it is sampled."""


class LatentStore:
    """Latents by content and placement, so that an image in many rows is encoded once.

    Args:
        autoencoder: encodes.
        rows: where an image is decoded again when a new variant of it is asked for.
        limit: bytes to keep; None keeps all.
        spread: keep the posterior's standard deviation too.
    """

    def __init__(
        self, autoencoder: Autoencoder, rows: Rows, limit: int | None, *, spread: bool = False
    ) -> None:
        self._autoencoder = autoencoder
        self._rows = rows
        self._limit = limit
        self._spread = spread
        self._bytes = 0
        self._kept: OrderedDict[Variant, Posterior] = OrderedDict()
        self._queues: dict[tuple[int, int], dict[Variant, tuple[Picture, Tensor]]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def lacks(self, picture: Picture, placement: Placement) -> bool:
        """Whether this variant has not been encoded yet."""
        variant = (picture.digest, placement)
        return variant not in self._kept and variant not in self._queue(placement)

    def queue(self, picture: Picture, placement: Placement, pixels: Tensor) -> None:
        """Encode in a batch with others of its shape, soon; `flush` ends it."""
        if not self.lacks(picture, placement):
            return
        queue = self._queue(placement)
        queue[picture.digest, placement] = (picture, pixels)
        if len(queue) >= self._autoencoder.batch_size(*placement.target):
            self._encode(queue)

    def flush(self) -> None:
        """Encode what is queued."""
        for queue in self._queues.values():
            self._encode(queue)

    def get(self, picture: Picture, placement: Placement) -> Posterior:
        """Float32. A new variant is encoded alone, so that no batch changes its bits."""
        variant = (picture.digest, placement)
        if variant not in self._kept:
            image = reopen(self._rows, picture)
            self.queue(picture, placement, placement.pixels(image))
            self.flush()
        self._kept.move_to_end(variant)
        return self._kept[variant]

    def _queue(self, placement: Placement) -> dict[Variant, tuple[Picture, Tensor]]:
        return self._queues.setdefault(placement.target, {})

    def _encode(self, queue: dict[Variant, tuple[Picture, Tensor]]) -> None:
        if not queue:
            return
        pixels = torch.stack([pixels for _, pixels in queue.values()])  # (N, 3, H, W)
        means, deviations = self._autoencoder.posterior(pixels)  # (N, C, h, w)
        for place, (variant, (picture, _)) in enumerate(queue.items()):
            mean, deviation = means[place], deviations[place]
            if not bool(torch.isfinite(mean).all() & torch.isfinite(deviation).all()):
                raise DataError(
                    f"Latents must be finite; {where(self._rows, picture)} gave NaN or infinity. "
                    "Look at the image, and at the weights of the pipeline's VAE."
                )
            self._keep(variant, (mean.clone(), deviation.clone() if self._spread else None))
        queue.clear()

    def _keep(self, variant: Variant, posterior: Posterior) -> None:
        self._kept[variant] = posterior
        self._bytes += _size(posterior)
        while self._limit is not None and self._bytes > self._limit and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _size(oldest)


def _size(posterior: Posterior) -> int:
    return sum(part.nbytes for part in posterior if part is not None)


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
        self._geometry = Geometry(options)
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
            augmentation = self._geometry.augmentation(self._seed, epoch, row.number)
            placements = self._geometry.placements(row.pictures, augmentation)
            for place, (picture, placement) in enumerate(
                zip(row.pictures, placements, strict=True)
            ):
                latents.append(self._latent(picture, placement, epoch, row.number, place))
                geometry.append(placement.time_ids())
        content = ImageContent(
            tuple(latents),
            torch.tensor(geometry, dtype=torch.float32).reshape(len(latents), 6),
            self._prompts.look_up(prompts),
        )
        return self.labels.batch(content, indices)

    def mismatched(self, indices: Sequence[int]) -> list[int]:
        return self.labels.mismatched(indices, [self._rows[index].prompt for index in indices])

    def _latent(
        self, picture: Picture, placement: Placement, epoch: int, row: int, place: int
    ) -> Tensor:
        """(C, h, w) float32: the posterior's mean, or this epoch's sample of it."""
        mean, deviation = self._latents.get(picture, placement)
        if self._options.latents == "mean":
            return mean
        assert deviation is not None
        noise = generator("latents", self._seed, epoch, row, place).standard_normal(mean.shape)
        return mean + deviation * torch.from_numpy(noise).float()

    def _drops_caption(self, row: ImageRow, epoch: int) -> bool:
        share = self._options.caption_dropout
        return share > 0 and generator("caption", self._seed, epoch, row.number).random() < share


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
    geometry = Geometry(options)
    limit = AUGMENTED_BYTES if geometry.fixed is None else None
    latents = LatentStore(autoencoder, opened, limit, spread=options.latents == "sample")
    sieve = Sieve(opened, options.on_bad_row)
    rows = []
    reading = read_examples(opened, kind, options, sieve, _variants(geometry, latents))
    for row, made in _shown(reading, len(opened), kind):
        for picture, variants in zip(row.pictures, made, strict=True):
            for placement, pixels in variants:
                latents.queue(picture, placement, pixels)
        rows.append(row)
    latents.flush()
    sieve.warn()
    if not rows:
        raise DataError(
            f"Data must hold at least one usable row; {opened.name} has none. Left out: "
            f"{dict(sieve.skipped)}."
        )
    prompts = PromptTable(pipe, family, (row.prompt for row in rows), device)
    if geometry.fixed is not None:
        autoencoder.release()
    return ImageExamples(rows, latents, prompts, options, seed=seed, skipped=sieve.skipped)


Variants = list[tuple[Placement, Tensor]]
"""What of an image is to be encoded: placements and pixels."""


def _variants(geometry: Geometry, latents: LatentStore) -> Prepare:
    """Make pixels, while an image is decoded, of all its variants that are not encoded yet."""

    def of_row(pictures: list[Picture]) -> Callable[[Picture, Image], Variants]:
        placements = [geometry.placements(pictures, one) for one in geometry.fixed or ()]

        def of_picture(picture: Picture, image: Image) -> Variants:
            place = pictures.index(picture)
            wanted = [of_all[place] for of_all in placements]
            return [(one, one.pixels(image)) for one in wanted if latents.lacks(picture, one)]

        return of_picture

    return of_row


def _shown(reading: Iterator[Any], total: int, kind: str) -> Iterator[Any]:
    return iter(tqdm(reading, f"Reading image {kind}", total, leave=False, disable=None))


def distinct_prompts(data: Any, options: ImageOptions, limit: int) -> list[str]:
    """The first `limit` distinct prompts of the data; rows without one are passed over."""
    found: dict[str, None] = {}
    for row in open_rows(data, options):
        if len(found) >= limit:
            break
        prompt = row.get("prompt", row.get("caption"))
        if isinstance(prompt, str) and in_part(prompt, options.held_out_share, options.part):
            found[prompt] = None
    return list(found)
