"""SDXL's base with its refiner, as an opponent in evaluations: sampled from, never trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from alignkit.errors import ConfigError
from alignkit.options import GenerationOptions
from alignkit.ranges import share
from alignkit_diffusion.generation import image_generator


class BaseAndRefiner:
    """The ensemble of Podell et al. 2023 (2307.01952, sec. 2.5): the base denoises to `switch`, the
    refiner goes on from its latents.

    Args:
        base: a `StableDiffusionXLPipeline`, in the dtype and on the device where it shall run.
        refiner: the refiner's `StableDiffusionXLImg2ImgPipeline`, likewise.
        switch: the share of the noise levels that is the base's.

    Raises:
        ConfigError: they are pipelines of other classes.
    """

    def __init__(self, base: Any, refiner: Any, *, switch: float = 0.8) -> None:
        wanted = (
            ("base", base, "StableDiffusionXLPipeline"),
            ("refiner", refiner, "StableDiffusionXLImg2ImgPipeline"),
        )
        for part, pipe, name in wanted:
            if type(pipe).__name__ != name:
                raise ConfigError(
                    f"BaseAndRefiner takes a {name} as its {part}; got {type(pipe).__name__}."
                )
        share("BaseAndRefiner", switch=switch)
        self.base, self.refiner, self.switch = _own(base), _own(refiner), switch

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], options: GenerationOptions, *, seed: int) -> list[Any]:
        """One PIL image per prompt, from the same starting noise as an image policy's samples."""
        images = []
        for place, prompt in enumerate(prompts):
            drawn = image_generator(seed, place)
            shared = {
                "prompt": prompt,
                "num_inference_steps": options.steps,
                "guidance_scale": options.guidance_scale,
                "generator": drawn,
            }
            latents = self.base(
                **shared,
                height=options.height,
                width=options.width,
                denoising_end=self.switch,
                output_type="latent",
            ).images
            images += self.refiner(**shared, image=latents, denoising_start=self.switch).images
        return images


def _own(pipe: Any) -> Any:
    """The pipeline with a scheduler of its own, whose state sampling moves."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    settings = {name: pipe.config[name] for name in _SETTINGS if name in pipe.config}
    made = type(pipe)(
        **{**pipe.components, "scheduler": scheduler}, **settings, add_watermarker=False
    )
    made.set_progress_bar_config(disable=True)
    return made


_SETTINGS = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
