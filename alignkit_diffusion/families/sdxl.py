"""Stable Diffusion XL (Podell et al. 2023, 2307.01952): two text encoders, sizes as conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
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

TIME_IDS = 6
"""Original height, width; crop top, left; target height, width (sec. 2.2). The refiner has 5."""


@dataclass(frozen=True)
class SDXL(Discrete):
    """The base model of SDXL and its fine-tunes, predicting noise or v."""

    name: str = "sdxl"

    compared: ClassVar[tuple[str, ...]] = (
        *Discrete.compared,
        "projection_class_embeddings_input_dim",
    )
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    class_name: ClassVar[str] = "StableDiffusionXLPipeline"

    @classmethod
    def of(cls, pipe: Any, given: str) -> SDXL:
        """The family of a `StableDiffusionXLPipeline`.

        Raises:
            ConfigError: parts are missing; it is the refiner, an inpainting UNet or one that learns
                its variance; or its scheduler does not fit.
        """
        _refuse_refiner(pipe, given)
        refuse_incomplete(pipe, given, ("vae", "scheduler", "tokenizer", "tokenizer_2"), "SDXL")
        refuse_other_channels(pipe, given)
        return cls(read_schedule(pipe.scheduler))

    def conditioning(self, content: ImageContent, group: Tensor, device: Any) -> Conditioning:
        """Prompt features (N, L, D) and (N, P) of each image's group, time ids (N, 6) float32."""
        assert content.prompts.pooled is not None
        group = group.to(device)
        # Float32 like the latents: text encoders may be in another dtype than the UNet computes in.
        return {
            "hidden": widened(content.prompts.hidden.to(device)[group]),
            "pooled": widened(content.prompts.pooled.to(device)[group]),
            "time_ids": content.geometry.to(device),
        }

    def unet_arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        # The UNet embeds the time ids first and casts the embedding, so they enter unrounded.
        added = {"text_embeds": conditioning["pooled"], "time_ids": conditioning["time_ids"]}
        return {**super().unet_arguments(conditioning), "added_cond_kwargs": added}

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], device: Any) -> PromptEmbeddings:
        hidden, _, pooled, _ = pipe.encode_prompt(
            list(prompts), device=device, do_classifier_free_guidance=False
        )
        return PromptEmbeddings(hidden, pooled)

    def dropped_prompt(self, pipe: Any, device: Any) -> PromptEmbeddings:
        embeddings = self.encode_prompts(pipe, [""], device)
        if not pipe.config.force_zeros_for_empty_prompt:
            return embeddings
        assert embeddings.pooled is not None
        return PromptEmbeddings(
            torch.zeros_like(embeddings.hidden), torch.zeros_like(embeddings.pooled)
        )

    def embed(self, pipe: Any, prompts: Sequence[str], device: Any) -> dict[str, Tensor]:
        hidden, negative_hidden, pooled, negative_pooled = pipe.encode_prompt(
            list(prompts), device=device, do_classifier_free_guidance=True
        )
        return {
            "prompt_embeds": hidden.float(),
            "negative_prompt_embeds": negative_hidden.float(),
            "pooled_prompt_embeds": pooled.float(),
            "negative_pooled_prompt_embeds": negative_pooled.float(),
        }

    def sampler_settings(self, pipe: Any) -> Mapping[str, Any]:
        return {
            "force_zeros_for_empty_prompt": pipe.config.force_zeros_for_empty_prompt,
            "add_watermarker": False,
        }


def _refuse_refiner(pipe: Any, given: str) -> None:
    config = pipe.unet.config
    if config.addition_embed_type != "text_time" or not config.addition_time_embed_dim:
        raise ConfigError(
            "SDXL's UNet is conditioned on sizes (addition_embed_type 'text_time'); the one of "
            f"{given} has {config.addition_embed_type!r}. {BASES}"
        )
    if pipe.text_encoder is None or pipe.text_encoder_2 is None:
        raise ConfigError(
            f"SDXL policies need both text encoders; {given} has one, as the refiner does, which "
            f"continues the base's last steps and is no text-to-image policy. {BASES}"
        )
    pooled = pipe.text_encoder_2.config.projection_dim
    features = pipe.unet.add_embedding.linear_1.in_features
    time_ids = (features - pooled) / config.addition_time_embed_dim
    if time_ids != TIME_IDS:
        raise ConfigError(
            f"SDXL's base is conditioned on {TIME_IDS} size numbers; the UNet of {given} takes "
            f"{time_ids:g} (the refiner takes 5, with an aesthetic score). {BASES}"
        )
