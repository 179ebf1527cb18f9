"""Image rows as prepared examples: latents and prompt embeddings, encoded once.

A training step then runs the UNet and nothing else. Augmentation is keyed by (seed, epoch, row):
the crop, flip and caption dropout of a row are the same for all of its images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignkit.batches import Batch
from alignkit.columns import Sieve, warn_of_skipped
from alignkit.draws import generator
from alignkit.options import ImageOptions
from alignkit_diffusion.autoencoder import Autoencoder
from alignkit_diffusion.cache.build import Builder
from alignkit_diffusion.conditioning import Prompts, PromptTable
from alignkit_diffusion.content import ImageContent
from alignkit_diffusion.families import Family
from alignkit_diffusion.geometry import Geometry
from alignkit_diffusion.images import Placement
from alignkit_diffusion.latents import AUGMENTED_BYTES, LatentStore
from alignkit_diffusion.parts import Parts
from alignkit_diffusion.pictures import Picture
from alignkit_diffusion.reading import part_of, refuse_empty, scan
from alignkit_diffusion.rows import open_rows
from alignkit_diffusion.table import RowTable


class ImageExamples:
    """Prepared rows: the `Examples` of this wing.

    Attributes:
        skipped: reason -> rows left out by the options.
        first: what the numbers of its rows begin at, in a mixture.
    """

    def __init__(
        self,
        table: RowTable,
        latents: LatentStore,
        prompts: Prompts,
        options: ImageOptions,
        *,
        seed: int,
        skipped: Mapping[str, int],
        first: int = 0,
    ) -> None:
        self.skipped = dict(skipped)
        self.table = table
        self.first = first
        self.labels = table.labels(first)
        self._latents = latents
        self._prompts = prompts
        self._options = options
        self._geometry = Geometry(options)
        self._seed = seed

    def __len__(self) -> int:
        return len(self.table)

    @property
    def end(self) -> int:
        """What the numbers of rows behind these begin at."""
        return self.first + (self.table.number(len(self) - 1) + 1 if len(self) else 0)

    def collate(self, indices: Sequence[int], epochs: Sequence[int]) -> Batch:
        """The given rows as a batch; of a tied pair both ranks are 0."""
        return self.labels.batch(self.content(indices, epochs), indices)

    def prompt(self, index: int) -> str:
        """A row's prompt."""
        return self.table.prompt(index)

    def content(self, indices: Sequence[int], epochs: Sequence[int]) -> ImageContent:
        """What the UNet reads of the given rows."""
        prompts: list[str | None] = []
        latents, geometry = [], []
        for index, epoch in zip(indices, epochs, strict=True):
            number = self.first + self.table.number(index)
            dropped = self._drops_caption(number, epoch)
            prompts.append(None if dropped else self.table.prompt(index))
            augmentation = self._geometry.augmentation(self._seed, epoch, number)
            pictures = self.table.pictures(index)
            placements = self._geometry.placements(pictures, augmentation)
            for place, (picture, placement) in enumerate(zip(pictures, placements, strict=True)):
                latents.append(self._latent(picture, placement, epoch, number, place))
                geometry.append(placement.time_ids())
        return ImageContent(
            tuple(latents),
            torch.tensor(geometry, dtype=torch.float32).reshape(len(latents), 6),
            self._prompts.look_up(prompts),
        )

    def fingerprint(self) -> str:
        return self.table.fingerprint()

    def mismatched(self, indices: Sequence[int]) -> list[int]:
        return self.labels.mismatched(indices, [self.prompt(index) for index in indices])

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

    def _drops_caption(self, row: int, epoch: int) -> bool:
        share = self._options.caption_dropout
        return share > 0 and generator("caption", self._seed, epoch, row).random() < share


def prepare_examples(
    data: Any,
    options: ImageOptions,
    *,
    kind: str,
    parts: Parts,
    family: Family,
    autoencoder: Autoencoder,
    device: torch.device,
    seed: int,
    first: int = 0,
    may_be_empty: bool = False,
) -> ImageExamples:
    """Read, check and encode image rows.

    Without random crops every image is encoded here, and the VAE is done; with them, a variant is
    encoded when its epoch first needs it. With a cache that holds them, neither VAE nor text
    encoders are loaded.

    Args:
        first: what the numbers of the rows begin at.
        may_be_empty: let there be no usable row.

    Raises:
        ConfigError: a renamed column is not one of image rows.
        DataError: see `rows.open_rows` and `rows.read_examples`; or no row is usable.
    """
    fixed = Geometry(options).fixed is not None
    prompts: Prompts
    if options.cache is not None:
        cached = Builder(
            data,
            options,
            kind=kind,
            parts=parts,
            family=family,
            autoencoder=autoencoder,
            device=device,
        ).run()
        table, left_out = part_of(cached.table, options)
        latents, prompts = cached.latents, cached.prompts
        skipped = {**cached.skipped, **left_out}
        name = str(data) if isinstance(data, str | Path) else f"the given {type(data).__name__}"
        warn_of_skipped(name, skipped)
    else:
        opened = open_rows(data, options, kind)
        limit, spread = None if fixed else AUGMENTED_BYTES, options.latents == "sample"
        latents = LatentStore(autoencoder, opened, limit, spread=spread)
        sieve = Sieve(opened, options.on_bad_row)
        table = RowTable.of(scan(opened, kind, options, sieve, latents))
        sieve.warn()
        name, skipped = opened.name, dict(sieve.skipped)
        prompts = PromptTable(parts, family, table.prompts, device)
    if not may_be_empty:
        refuse_empty(table, name, skipped)
    if fixed:
        autoencoder.release()
    return ImageExamples(
        *(table, latents, prompts, options), seed=seed, skipped=skipped, first=first
    )
