"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022, 2112.10752): one text encoder, no sizes.

1.x predicts noise at 512 px; 2.1 predicts v at 768 px, under a wider text encoder. The scheduler's
files say which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from alignkit.errors import ConfigError
from alignkit_diffusion.content import ImageContent, PromptEmbeddings, widened
from alignkit_diffusion.families import Conditioning
from alignkit_diffusion.families.discrete import (
    BASES,
    Discrete,
    refuse_incomplete,
    refuse_other_channels,
)
from alignkit_diffusion.schedule import read_schedule


@dataclass(frozen=True)
class SD15(Discrete):
    """Stable Diffusion 1.x and 2.x and their fine-tunes, predicting noise or v."""

    name: str = "sd15"

    class_name: ClassVar[str] = "StableDiffusionPipeline"

    @classmethod
    def of(cls, pipe: Any, given: str) -> SD15:
        """The family of a `StableDiffusionPipeline`.

        Raises:
            ConfigError: parts are missing; the UNet is conditioned on more than text, or is that of
                an inpainting model; or its scheduler does not fit.
        """
        refuse_incomplete(
            pipe, given, ("vae", "scheduler", "text_encoder", "tokenizer"), "Stable Diffusion"
        )
        config = pipe.unet.config
        more = config.addition_embed_type or config.class_embed_type
        if more:
            raise ConfigError(
                "The UNet of Stable Diffusion 1.x and 2.x is conditioned on text alone; the one of "
                f"{given} also takes {more!r}. {BASES}"
            )
        refuse_other_channels(pipe, given)
        return cls(read_schedule(pipe.scheduler))

    def conditioning(self, content: ImageContent, group: Tensor, device: Any) -> Conditioning:
        """Prompt features (N, L, D) of each image's group, float32."""
        return {"hidden": widened(content.prompts.hidden.to(device)[group.to(device)])}

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], device: Any) -> PromptEmbeddings:
        hidden, _ = pipe.encode_prompt(list(prompts), device, 1, False)
        return PromptEmbeddings(hidden)

    def embed(self, pipe: Any, prompts: Sequence[str], device: Any) -> dict[str, Tensor]:
        hidden, negative = pipe.encode_prompt(list(prompts), device, 1, True)
        return {"prompt_embeds": hidden.float(), "negative_prompt_embeds": negative.float()}

    def sampler_settings(self, pipe: Any) -> Mapping[str, Any]:
        # The checker looks at finished pictures; latents are decoded outside.
        return {"safety_checker": None, "requires_safety_checker": False}
