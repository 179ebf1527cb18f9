"""Latents by content and placement, each encoded once: in memory, or in a store on disk."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.errors import DataError
from alignkit.rows import Rows
from alignkit_diffusion.autoencoder import Autoencoder
from alignkit_diffusion.cache.keys import short_hash
from alignkit_diffusion.cache.shard import Damaged, Entry
from alignkit_diffusion.cache.store import Store
from alignkit_diffusion.images import Placement
from alignkit_diffusion.pictures import Picture, reopen, where

log = logging.getLogger("alignkit")

AUGMENTED_BYTES = 4 * 2**30
"""Memory for latents of random crops; the least recently used are encoded again."""

Variant = tuple[str, Placement]
"""Content hash and placement: what a latent depends on."""

Posterior = tuple[Tensor, Tensor | None]
"""Mean and standard deviation (C, h, w) of an image's latent; the latter only if it is sampled."""


@dataclass(frozen=True)
class Disk:
    """Where latents are kept between runs.

    Attributes:
        store: of one VAE and dtype.
        dtype: that they are kept in.
    """

    store: Store
    dtype: torch.dtype


class LatentStore:
    """Latents of the images of a data set.

    Attributes:
        encoded: how many this process has encoded.

    Args:
        autoencoder: encodes.
        rows: where an image is decoded again when a new variant of it is asked for.
        limit: bytes to keep in memory; None keeps all.
        spread: keep the posterior's standard deviation too.
        disk: where variants are kept and looked for; None keeps them in memory.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        rows: Rows | None,
        limit: int | None,
        *,
        spread: bool = False,
        disk: Disk | None = None,
    ) -> None:
        self.rows = rows
        self._autoencoder = autoencoder
        self._limit = limit
        self._spread = spread
        self._disk = disk
        self.encoded = 0
        self._bytes = 0
        self._kept: OrderedDict[Variant, Posterior] = OrderedDict()
        self._queues: dict[tuple[int, int], dict[Variant, tuple[Picture, Tensor]]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def lacks(self, picture: Picture, placement: Placement) -> bool:
        """Whether this variant has not been encoded yet."""
        variant = (picture.digest, placement)
        if variant in self._kept or variant in self._queue(placement):
            return False
        return self._disk is None or not any(k in self._disk.store for k in self._keys(variant))

    def key(self, picture: Picture, placement: Placement) -> bytes:
        """Under which a variant is kept on disk."""
        return self._keys((picture.digest, placement))[0]

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
        if variant in self._kept:
            self._kept.move_to_end(variant)
            return self._kept[variant]
        found = self._from_disk(picture, variant)
        if found is not None:
            return found
        if self.rows is None:
            raise DataError(
                f"The cache lacks the image of row {picture.row}, column {picture.column!r}, and "
                "there is no data to encode it from. Run alignkit cache images again."
            )
        image = reopen(self.rows, picture)
        self.queue(picture, placement, placement.pixels(image))
        self.flush()
        if self._disk is not None:
            self._disk.store.flush()
        found = self._kept.get(variant) or self._from_disk(picture, variant)
        assert found is not None
        return found

    def _from_disk(self, picture: Picture, variant: Variant) -> Posterior | None:
        if self._disk is None:
            return None
        for key in self._keys(variant):
            try:
                entry = self._disk.store.get(key)
            except Damaged as damaged:
                self._mend(damaged, picture)
                return None
            if entry is not None:
                spread = entry.get("std")
                return entry["mean"].float(), None if spread is None else spread.float()
        return None

    def _mend(self, damaged: Damaged, picture: Picture) -> None:
        assert self._disk is not None
        lost = self._disk.store.mend(damaged.shard)
        log.warning(
            "%s. It held the image of row %d, column %r; %d of its entries are lost and are "
            "encoded again when they are needed, the others are kept.",
            damaged,
            picture.row,
            picture.column,
            lost,
        )

    def _keys(self, variant: Variant) -> list[bytes]:
        """The key of a variant, and that of one that holds more than is asked for."""
        digest, placement = variant
        parts = (bytes.fromhex(digest), placement.key())
        both = short_hash(*parts, "mean and std")
        return [both] if self._spread else [short_hash(*parts, "mean"), both]

    def _queue(self, placement: Placement) -> dict[Variant, tuple[Picture, Tensor]]:
        return self._queues.setdefault(placement.target, {})

    def _encode(self, queue: dict[Variant, tuple[Picture, Tensor]]) -> None:
        if not queue:
            return
        pixels = torch.stack([pixels for _, pixels in queue.values()])  # (N, 3, H, W)
        means, deviations = self._autoencoder.posterior(pixels)  # (N, C, h, w)
        if self._disk is not None:
            means, deviations = means.to(self._disk.dtype), deviations.to(self._disk.dtype)
        for place, (variant, (picture, _)) in enumerate(queue.items()):
            mean, deviation = means[place], deviations[place]
            if not bool(torch.isfinite(mean).all() & torch.isfinite(deviation).all()):
                raise DataError(
                    f"Latents must be finite; {self._where(picture)} gave NaN or infinity. "
                    "Look at the image, and at the weights of the pipeline's VAE."
                )
            self._keep(variant, (mean.clone(), deviation.clone() if self._spread else None))
        self.encoded += len(queue)
        queue.clear()

    def _where(self, picture: Picture) -> str:
        return f"row {picture.row}" if self.rows is None else where(self.rows, picture)

    def _keep(self, variant: Variant, posterior: Posterior) -> None:
        if self._disk is not None:
            mean, deviation = posterior
            entry: Entry = {"mean": mean} if deviation is None else {"mean": mean, "std": deviation}
            self._disk.store.put(self._keys(variant)[0], entry)
            return
        self._kept[variant] = posterior
        self._bytes += _size(posterior)
        while self._limit is not None and self._bytes > self._limit and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _size(oldest)


def _size(posterior: Posterior) -> int:
    return sum(part.nbytes for part in posterior if part is not None)
