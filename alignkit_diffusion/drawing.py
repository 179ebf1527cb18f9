"""Timesteps and noise: what training draws, and strata for what held-out rows are asked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from alignkit.batches import Batch
from alignkit.draws import generator
from alignkit.protocols import Key
from alignkit_diffusion.content import ImageContent, ImageDraw
from alignkit_diffusion.families import Family

STRATA = 4
"""Ranges of timesteps, of equal width."""


def stratum(timesteps: Sequence[int], number: int) -> Sequence[int]:
    """A quarter of the timesteps there are, or all of them where there are too few."""
    size = len(timesteps)
    if size < STRATA:
        return timesteps
    return sorted(timesteps)[size * number // STRATA : size * (number + 1) // STRATA]


def strata_of(timesteps: Tensor, num_timesteps: int) -> tuple[tuple[str, ...], Tensor]:
    """Names of the strata, such as "t0-250", and in which one each timestep lies."""
    limits = [num_timesteps * number // STRATA for number in range(STRATA + 1)]
    names = tuple(f"t{low}-{high}" for low, high in pairwise(limits))
    return names, torch.bucketize(timesteps, torch.tensor(limits[1:-1]), right=True)


class Drawing:
    """The draws of an image backend.

    Attributes:
        bank: draws per row that training takes from; None draws anew at each step.
        error_scale: minus twice the log-likelihood is the (weighted) error; in nats, minus itself.
    """

    family: Family
    bank: int | None
    error_scale: float

    def draw(self, batch: Batch, key: Key) -> ImageDraw:
        """One timestep, uniform over those of the family, and one standard normal noise for each
        group.

        They are a function of (seed, optimizer step, position in the global batch), so that no
        split over micro-batches or processes changes them. In evaluation, which is step 0, groups
        that follow one another take their timesteps from one stratum after another. With a bank, a
        training step takes one of the row's draws instead.
        """
        seed, step = key
        positions = batch.position.tolist()
        if self.bank is None or step == 0:
            places = [(*key, position) for position in positions]
            return self._drawn(batch, places, self._timesteps(batch, key))
        numbers = [int(generator("bank", *key, p).integers(self.bank)) for p in positions]
        return self.banked_draw(batch, numbers, seed)

    def _timesteps(self, batch: Batch, key: Key) -> list[int]:
        """Of each group; in evaluation from the stratum of its position."""
        known, found = self._known(), []
        for position in batch.position.tolist():
            among = known if key[1] else stratum(known, position % STRATA)
            place = int(generator("timestep", *key, position).integers(len(among)))
            found.append(among[place])
        return found

    def _known(self) -> Sequence[int]:
        return self.family.timesteps or range(self.family.num_timesteps)

    def strata(self, batch: Batch, key: Key) -> tuple[tuple[str, ...], Tensor]:
        """Quarters of the timesteps, and which one each group's draw is from."""
        drawn = torch.tensor(self._timesteps(batch, key), dtype=torch.int64)
        return strata_of(drawn, self.family.num_timesteps)

    def banked_draw(self, batch: Batch, numbers: Sequence[int], seed: int) -> ImageDraw:
        """The draws of the given numbers, one per group: functions of (seed, row, number)."""
        rows, known = batch.row_id.tolist(), self._known()
        places = [(seed, *place) for place in zip(rows, numbers, strict=True)]
        streams = [generator("banked timestep", *place) for place in places]
        timesteps = [known[int(stream.integers(len(known)))] for stream in streams]
        drawn = self._drawn(batch, places, timesteps, "banked ")
        return replace(drawn, numbers=tuple(numbers))

    def _drawn(
        self,
        batch: Batch,
        places: Sequence[tuple[int, ...]],
        timesteps: Sequence[int],
        stream: str = "",
    ) -> ImageDraw:
        """The noise of each group, keyed by its place, and its timestep."""
        content: ImageContent = batch.content
        firsts = torch.searchsorted(batch.group, torch.arange(batch.num_groups)).tolist()
        noise = []
        for place, first in zip(places, firsts, strict=True):
            shape = tuple(content.latents[first].shape)
            values = generator(f"{stream}noise", *place).standard_normal(shape, dtype="float32")
            noise.append(torch.from_numpy(values))
        return ImageDraw(torch.tensor(timesteps, dtype=torch.int64), tuple(noise))
