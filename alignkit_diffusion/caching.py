"""Filling a cache ahead of all runs: the VAE and the text encoders are loaded, the UNet is not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignkit.columns import check_kind
from alignkit.mixtures import Mixture
from alignkit.options import ImageOptions
from alignkit_diffusion.autoencoder import Autoencoder
from alignkit_diffusion.cache.build import Builder
from alignkit_diffusion.geometry import checked
from alignkit_diffusion.policy import factor_of, load_policy, native_size
from alignkit_diffusion.table import RowTable


@dataclass(frozen=True)
class CachedImages:
    """What a pass over a data set left.

    Attributes:
        folder: of the cache.
        rows: that can be used; of all parts of the data.
        images: of these rows, each counted once.
        prompts: of these rows, each counted once.
        encoded: images that this process encoded now, each size and flip counted.
        damaged: entries that were given up, and encoded again.
        skipped: reason -> rows left out.
    """

    folder: Path
    rows: int
    images: int
    prompts: int
    encoded: int
    damaged: int
    skipped: dict[str, int]


def cache_images(
    pipeline: Any,
    data: Any,
    options: ImageOptions,
    *,
    kind: str = "pairs",
    precision: str = "fp32",
    whole: bool = False,
    device: Any = "cpu",
    verify: bool = False,
) -> CachedImages:
    """Encode all images and prompts of a data set that the cache does not hold yet.

    Any number of processes may do this at once, on one machine or on several that see the folder:
    they share the work. Any of them may be killed at any time; the same call goes on.

    Args:
        pipeline: a diffusers folder, a hub name, or a pipeline in memory.
        data: image rows, as `align` takes them, or a mixture of such.
        options: those of the runs to come; `cache` says where, None is "auto".
        kind: of the rows: "pairs", "groups", "unpaired" or "supervised".
        precision, whole: of the runs to come: "fp32", "bf16" or "fp16", and whether they train the
            whole UNet. Text encoders compute in the same precision as there.
        device: where things are encoded.
        verify: read everything first, and encode again what is damaged.

    Raises:
        DataError: a row cannot be used and the options say "error"; or the disk refuses.
    """
    check_kind(kind)
    place = torch.device(device)
    loaded = load_policy(pipeline, precision=precision, whole=whole, device=place, unet=False)
    autoencoder = Autoencoder(loaded.parts.vae, place, loaded.parts.fill_vae)
    factor = autoencoder.factor
    native, unit = min(native_size(loaded.pipe, factor)), factor_of(loaded.pipe, factor)
    given = ImageOptions(cache="auto") if options is None else options
    sets = [one for _, one, _ in data.entries()] if isinstance(data, Mixture) else [data]
    damaged, found, skipped = 0, [], Counter[str]()
    for number, one in enumerate(sets):
        builder = Builder(
            one,
            checked(given, native, unit),
            kind=kind,
            parts=loaded.parts,
            family=loaded.family,
            autoencoder=autoencoder,
            device=place,
        )
        damaged += builder.verify() if verify and number == 0 else 0
        found.append(builder.run())
        skipped.update(found[-1].skipped)
    if loaded.borrowed is not None:
        loaded.give_back()
    table = RowTable.joined([one.table for one in found])
    return CachedImages(
        folder=builder.root,
        rows=len(table),
        images=_distinct(table),
        prompts=len(table.prompts),
        encoded=sum(one.latents.encoded for one in found),
        damaged=damaged,
        skipped=dict(skipped),
    )


def _distinct(table: RowTable) -> int:
    import numpy as np

    return len(np.unique(table.columns["digest"], axis=0)) if table.num_images else 0
