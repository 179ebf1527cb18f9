"""Latents and prompt embeddings of image data, computed ahead of all runs and shared by them."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

from alignkit.config import RunConfig, check, resolve_data_options
from alignkit.criteria import rows_of
from alignkit.errors import ConfigError
from alignkit.methods import DPO
from alignkit.options import ImageOptions, LoRA, TrainerOptions
from alignkit.parts import MODALITIES, modality_of
from alignkit.runtime import Runtime, pick_precision


def cache_images(
    policy: Any,
    data: Any,
    *,
    kind: str = "pairs",
    data_options: ImageOptions | None = None,
    whole: bool = False,
    trainer: TrainerOptions | None = None,
    verify: bool = False,
) -> Any:
    """Encode all images and prompts that a run on `data` will ask for, and train nothing.

    Runs with the same `data_options.cache` find them, and load neither VAE nor text encoders.

    Args:
        policy: a diffusers folder, a hub name, or a pipeline in memory.
        data: as `align` takes it.
        kind: of the rows: "pairs", "groups", "unpaired" or "supervised".
        data_options: of the runs to come; without `cache`, the user's own cache is filled.
        whole: the runs to come train the whole UNet; their text encoders then compute in float32.
        trainer: its `precision` is used.
        verify: read everything first, and encode again what is damaged.

    Returns:
        `alignkit_diffusion.caching.CachedImages`.

    Raises:
        ConfigError: if `policy` is no image pipeline.
    """
    trainer = trainer or TrainerOptions()
    options = data_options or ImageOptions()
    if options.cache is None:
        options = replace(options, cache="auto")
    adapter = None if whole else LoRA()
    config = RunConfig(policy, DPO(), data, data_options=options, adapter=adapter, trainer=trainer)
    return cache_run(config, kind=kind, verify=verify)


def cache_run(config: RunConfig, *, kind: str | None = None, verify: bool = False) -> Any:
    """The same for a run as one value, whose method reads rows of some `kind`."""
    modality = modality_of(config.policy)
    if modality != "image":
        raise ConfigError(
            "Latents are of images: the policy must be a diffusers pipeline; got a language model. "
            "For its reference, write alignkit cache reference."
        )
    options = resolve_data_options(config, modality, ImageOptions())
    assert isinstance(options, ImageOptions)
    if options.cache is None:
        options = replace(options, cache="auto")
    check(replace(config, data_options=options), modality)
    return import_module(f"{MODALITIES[modality]}.caching").cache_images(
        config.policy,
        config.data,
        options,
        kind=kind or rows_of(config.method, modality),
        precision=pick_precision(config.trainer.precision),
        whole=config.adapter is None,
        device=Runtime().device,
        verify=verify,
    )
