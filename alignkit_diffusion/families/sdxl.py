"""Stable Diffusion XL (Podell et al. 2023, 2307.01952): two text encoders, sizes as conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.errors import ConfigError
from alignkit_diffusion.content import ImageContent, PromptEmbeddings
from alignkit_diffusion.families import Conditioning, Family, Prediction
from alignkit_diffusion.schedule import Schedule, read_schedule

TIME_IDS = 6
"""Original height, width; crop top, left; target height, width (sec. 2.2). The refiner has 5."""


@dataclass(frozen=True)
class SDXL:
    """The base model of SDXL and its fine-tunes, predicting noise or v."""

    schedule: Schedule
    name: str = "sdxl"

    @classmethod
    def of(cls, pipe: Any, given: str) -> SDXL:
        """The family of a `StableDiffusionXLPipeline`.

        Raises:
            ConfigError: parts are missing; it is the refiner, an inpainting UNet or one that learns
                its variance; or its scheduler does not fit.
        """
        _refuse_refiner(pipe, given)
        _refuse_incomplete(pipe, given)
        latent = pipe.vae.config.latent_channels
        taken, made = pipe.unet.config.in_channels, pipe.unet.config.out_channels
        if taken != latent or made != latent:
            raise ConfigError(
                f"The UNet must take and give the VAE's {latent} latent channels; the one of "
                f"{given} takes {taken}, as inpainting and edit models do, or gives {made}. Use "
                "the text-to-image base."
            )
        return cls(read_schedule(pipe.scheduler))

    @property
    def num_timesteps(self) -> int:
        return len(self.schedule)

    def conditioning(self, content: ImageContent, group: Tensor, device: Any) -> Conditioning:
        """Prompt features (N, L, D) and (N, P) of each image's group, time ids (N, 6) float32."""
        assert content.prompts.pooled is not None
        group = group.to(device)
        # Float32 like the latents: text encoders may be in another dtype than the UNet computes in.
        return {
            "hidden": content.prompts.hidden.to(device)[group].float(),
            "pooled": content.prompts.pooled.to(device)[group].float(),
            "time_ids": content.geometry.to(device),
        }

    def predict(
        self,
        unet: nn.Module,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
    ) -> Prediction:
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        # The UNet embeds the time ids first and casts the embedding, so they enter unrounded.
        added = {"text_embeds": conditioning["pooled"], "time_ids": conditioning["time_ids"]}
        (prediction,) = unet(
            noisy,
            timesteps.to(latents.device),
            encoder_hidden_states=conditioning["hidden"],
            added_cond_kwargs=added,
            return_dict=False,
        )
        target = self.schedule.target(latents, noise, timesteps)
        weight = torch.ones(len(latents), device=latents.device)
        return Prediction(prediction, target, weight)

    def differences(self, unet: Any, other: Family, other_unet: Any) -> list[str]:
        assert isinstance(other, SDXL)
        mine, theirs = self.schedule, other.schedule
        pairs: dict[str, tuple[Any, Any]] = {
            "prediction_type": (mine.prediction_type, theirs.prediction_type),
            "number of timesteps": (len(mine), len(theirs)),
        }
        for name in ("in_channels", "cross_attention_dim", "projection_class_embeddings_input_dim"):
            pairs[name] = (unet.config[name], other_unet.config[name])
        found = [f"{name} {a!r} against {b!r}" for name, (a, b) in pairs.items() if a != b]
        if not found and not torch.allclose(mine.alphas_cumprod, theirs.alphas_cumprod):
            found = ["another noise schedule (betas)"]
        return found

    def timestep_weights(self, kind: str) -> Tensor:
        return self.schedule.weights(kind)

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

    def describe(self) -> dict[str, Any]:
        return {
            "family": self.name,
            "prediction_type": self.schedule.prediction_type,
            "num_timesteps": self.num_timesteps,
        }


def _refuse_incomplete(pipe: Any, given: str) -> None:
    parts = ("vae", "scheduler", "tokenizer", "tokenizer_2")
    missing = [name for name in parts if getattr(pipe, name) is None]
    if missing:
        raise ConfigError(
            f"SDXL policies need {', '.join(parts)}; {given} lacks {', '.join(missing)}. Load the "
            "whole pipeline."
        )
    for suffix in ("", "_2"):
        limit = getattr(pipe, f"tokenizer{suffix}").model_max_length
        positions = getattr(pipe, f"text_encoder{suffix}").config.max_position_embeddings
        if limit > positions:
            raise ConfigError(
                f"tokenizer{suffix} must cut prompts to the {positions} tokens that "
                f"text_encoder{suffix} reads; that of {given} says model_max_length={limit}. "
                f"Are its files whole? Set model_max_length to {positions}."
            )


def _refuse_refiner(pipe: Any, given: str) -> None:
    config = pipe.unet.config
    fix = "Use a base such as 'stabilityai/stable-diffusion-xl-base-1.0' or a fine-tune of it."
    if config.addition_embed_type != "text_time" or not config.addition_time_embed_dim:
        raise ConfigError(
            "SDXL's UNet is conditioned on sizes (addition_embed_type 'text_time'); the one of "
            f"{given} has {config.addition_embed_type!r}. {fix}"
        )
    if pipe.text_encoder is None or pipe.text_encoder_2 is None:
        raise ConfigError(
            f"SDXL policies need both text encoders; {given} has one, as the refiner does, which "
            f"continues the base's last steps and is no text-to-image policy. {fix}"
        )
    pooled = pipe.text_encoder_2.config.projection_dim
    features = pipe.unet.add_embedding.linear_1.in_features
    time_ids = (features - pooled) / config.addition_time_embed_dim
    if time_ids != TIME_IDS:
        raise ConfigError(
            f"SDXL's base is conditioned on {TIME_IDS} size numbers; the UNet of {given} takes "
            f"{time_ids:g} (the refiner takes 5, with an aesthetic score). {fix}"
        )
