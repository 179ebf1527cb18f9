"""Sampling images for reports and comparisons, with nothing of the pipeline changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from alignkit.draws import generator
from alignkit.errors import ConfigError
from alignkit.options import GenerationOptions
from alignkit_diffusion.autoencoder import Autoencoder
from alignkit_diffusion.borrowed import evaluating
from alignkit_diffusion.conditioning import encoders_on
from alignkit_diffusion.families import Family
from alignkit_diffusion.kernels import Folding
from alignkit_diffusion.likelihood import AUTOCAST, autocast
from alignkit_diffusion.policy import native_size

PIXELS_PER_CALL = 4 * 1024 * 1024
HALVES = {dtype: name for name, dtype in AUTOCAST.items()}


def sample_images(
    pipe: Any,
    family: Family,
    autoencoder: Autoencoder,
    prompts: Sequence[str],
    options: GenerationOptions,
    *,
    seed: int,
    device: torch.device,
    precision: str,
) -> list[Any]:
    """One PIL image per prompt, each from its own noise, keyed by (seed, its place).

    Args:
        pipe: lends its weights and the class and settings of its scheduler.
        family: the pipeline's; it encodes prompts and makes the sampler.
        autoencoder: decodes, in float32.
        prompts: strings.
        options: `steps`, `guidance_scale`, `height`, `width` (None: what the UNet was trained for).
        seed: of the noise.
        device: of the UNet.
        precision: that the UNet computes in.

    Raises:
        ConfigError: height or width is no multiple of the VAE's factor.
    """
    if not prompts:
        return []
    height, width = size_of(pipe, autoencoder, options)
    sampler = family.sampler(pipe)
    chunk = max(1, PIXELS_PER_CALL // (height * width))
    starts = range(0, len(prompts), chunk)
    images: list[Any] = []
    # A UNet that was given back may be in half precision although it was trained in float32.
    precision = HALVES.get(next(pipe.unet.parameters()).dtype, precision)
    with (
        torch.no_grad(),
        encoders_on(pipe, device),
        evaluating(pipe.unet, device),
        Folding(pipe.unet),
    ):
        for start in tqdm(starts, desc="Sampling images", leave=False, disable=None):
            part = list(prompts[start : start + chunk])
            noise = [image_generator(seed, start + i) for i in range(len(part))]
            embedded = family.embed(pipe, part, device)
            with autocast(device, precision):
                latents = sampler(
                    **embedded,
                    num_inference_steps=options.steps,
                    guidance_scale=options.guidance_scale,
                    height=height,
                    width=width,
                    generator=noise,
                    output_type="latent",
                ).images  # (n, C, h, w)
            pixels = autoencoder.decode(latents)
            images += sampler.image_processor.postprocess(pixels, output_type="pil")
    autoencoder.release()
    return images


def size_of(pipe: Any, autoencoder: Autoencoder, options: GenerationOptions) -> tuple[int, int]:
    """Height and width that are asked for, or those that the UNet was trained for.

    Raises:
        ConfigError: one is no multiple of the VAE's factor.
    """
    native = native_size(pipe, autoencoder.factor)
    height = native[0] if options.height is None else options.height
    width = native[1] if options.width is None else options.width
    for name, value in (("height", height), ("width", width)):
        # diffusers' own check wants multiples of 8 whatever the VAE.
        unit = max(8, autoencoder.factor)
        if value % unit:
            raise ConfigError(
                f"generation.{name} must be a multiple of {unit} for this pipeline; got {value}. "
                f"Take {max(unit, round(value / unit) * unit)}."
            )
    return height, width


def image_generator(seed: int, place: int) -> torch.Generator:
    """Of the starting noise of the `place`-th image."""
    key = int(generator("sample", seed, place).integers(2**63))
    return torch.Generator("cpu").manual_seed(key)
