"""Pictures that are there, changed by the policy: image-to-image and inpainting.

Image-to-image is SDEdit (Meng et al. 2021, 2108.01073): noise the picture to a share `strength` of
the way, and denoise it from there under the prompt. Inpainting does so inside a mask, the rest of
each step being the picture's own noised latents.

diffusers' own pipelines do it, made from the policy's with `from_pipe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import ImageOps
from torch import nn
from tqdm.auto import tqdm

from alignkit.errors import ConfigError
from alignkit.options import GenerationOptions
from alignkit_diffusion.borrowed import evaluating
from alignkit_diffusion.conditioning import encoders_on
from alignkit_diffusion.generation import HALVES, image_generator, size_of
from alignkit_diffusion.kernels import Folding
from alignkit_diffusion.likelihood import autocast

MODES = {"image": "RGB", "mask_image": "L"}


class Editing:
    """What an image wing needs to be `alignkit.capabilities.EditsPictures`."""

    policy: Any
    device: torch.device
    precision: str
    _autoencoder: Any

    def edit(
        self,
        prompts: Sequence[str],
        pictures: Sequence[Any],
        options: GenerationOptions,
        *,
        strength: float,
        seed: int,
    ) -> list[Any]:
        """Each picture noised to `strength` and denoised under its prompt.

        Raises:
            ConfigError: strength is not in (0, 1], or so small that no step is left.
        """
        from diffusers import AutoPipelineForImage2Image

        given = [{"image": one} for one in pictures]
        return self._changed(AutoPipelineForImage2Image, prompts, given, options, strength, seed)

    def inpaint(
        self,
        prompts: Sequence[str],
        pictures: Sequence[Any],
        masks: Sequence[Any],
        options: GenerationOptions,
        *,
        strength: float,
        seed: int,
    ) -> list[Any]:
        """Each picture filled anew, under its prompt, where its mask is white.

        Raises:
            ConfigError: as for `edit`.
        """
        from diffusers import AutoPipelineForInpainting

        pairs = zip(pictures, masks, strict=True)
        given = [{"image": one, "mask_image": mask} for one, mask in pairs]
        return self._changed(AutoPipelineForInpainting, prompts, given, options, strength, seed)

    @torch.no_grad()
    def _changed(
        self,
        maker: Any,
        prompts: Sequence[str],
        given: Sequence[Mapping[str, Any]],
        options: GenerationOptions,
        strength: float,
        seed: int,
    ) -> list[Any]:
        if not 0 < strength <= 1 or int(options.steps * strength) < 1:
            raise ConfigError(
                "The strength of an edit is a share of the way to noise, above 0 and at most 1, "
                f"and leaves at least one of generation.steps={options.steps}; got {strength}."
            )
        pipe = self.policy
        height, width = size_of(pipe, self._autoencoder, options)
        editor = maker.from_pipe(pipe)
        editor.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        editor.set_progress_bar_config(disable=True)
        precision = HALVES.get(next(pipe.unet.parameters()).dtype, self.precision)
        home = next(pipe.vae.parameters()).device
        images = []
        try:
            nn.Module.to(pipe.vae, self.device)
            with encoders_on(pipe, self.device), evaluating(pipe.unet, self.device):
                for place, prompt in enumerate(tqdm(prompts, "Editing", leave=False, disable=None)):
                    fitted = {
                        name: ImageOps.fit(one.convert(MODES[name]), (width, height))
                        for name, one in given[place].items()
                    }
                    with autocast(self.device, precision), Folding(pipe.unet):
                        images += editor(
                            prompt=prompt,
                            **fitted,
                            strength=strength,
                            num_inference_steps=options.steps,
                            guidance_scale=options.guidance_scale,
                            generator=image_generator(seed, place),
                        ).images
        finally:
            nn.Module.to(pipe.vae, home)
        return images
