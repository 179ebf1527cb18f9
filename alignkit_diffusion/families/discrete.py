"""What the Stable Diffusion families have in common: noise or v, predicted on a discrete schedule.

A family of this kind says what its UNet is conditioned on and how its prompts are encoded; the rest
stands here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from alignkit.errors import ConfigError
from alignkit_diffusion.content import PromptEmbeddings
from alignkit_diffusion.families import Conditioning, Family, Prediction
from alignkit_diffusion.schedule import Schedule

BASES = (
    "Use a base such as 'stabilityai/stable-diffusion-xl-base-1.0' or a fine-tune of it, or one of "
    "Stable Diffusion 1.x or 2.x."
)


@dataclass(frozen=True)
class Discrete:
    """A family that predicts noise or v of a discrete variance-preserving schedule."""

    schedule: Schedule
    name: str = "discrete"

    compared: ClassVar[tuple[str, ...]] = ("in_channels", "cross_attention_dim")
    """Settings of the UNet in which policy and reference must agree."""
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """The pipeline's parts that read prompts."""
    class_name: ClassVar[str] = ""
    """The diffusers pipeline."""

    @property
    def pipeline_class(self) -> Any:
        import diffusers

        return getattr(diffusers, self.class_name)

    @property
    def num_timesteps(self) -> int:
        return len(self.schedule)

    @property
    def timesteps(self) -> tuple[int, ...] | None:
        return self.schedule.drawn

    def restricted(self, timesteps: str | Sequence[int]) -> Self:
        return replace(self, schedule=self.schedule.restricted(timesteps))

    def unet_arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        """What one call of the UNet is given beside noisy latents and timesteps."""
        return {"encoder_hidden_states": conditioning["hidden"]}

    def predict(
        self,
        unet: nn.Module,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
    ) -> Prediction:
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        (prediction,) = unet(
            noisy,
            timesteps.to(latents.device),
            **self.unet_arguments(conditioning),
            return_dict=False,
        )
        target = self.schedule.target(latents, noise, timesteps)
        weight = torch.ones(len(latents), device=latents.device)
        return Prediction(prediction, target, weight)

    def differences(self, unet: Any, other: Family, other_unet: Any) -> list[str]:
        if type(other) is not type(self):
            return [f"family {self.name!r} against {other.name!r}"]
        assert isinstance(other, Discrete)
        mine, theirs = self.schedule, other.schedule
        pairs: dict[str, tuple[Any, Any]] = {
            "prediction_type": (mine.prediction_type, theirs.prediction_type),
            "number of timesteps": (len(mine), len(theirs)),
        }
        for name in self.compared:
            pairs[name] = (unet.config[name], other_unet.config[name])
        found = [f"{name} {a!r} against {b!r}" for name, (a, b) in pairs.items() if a != b]
        if not found and not torch.allclose(mine.alphas_cumprod, theirs.alphas_cumprod):
            found = ["another noise schedule (betas)"]
        return found

    def timestep_weights(self, kind: str) -> Tensor:
        return self.schedule.weights(kind)

    def dropped_prompt(self, pipe: Any, device: Any) -> PromptEmbeddings:
        return self.encode_prompts(pipe, [""], device)

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], device: Any) -> PromptEmbeddings:
        raise NotImplementedError

    def sampler(self, pipe: Any) -> Any:
        """The pipeline without encoders and VAE, and with a scheduler of its own, whose state
        sampling moves. Encoders and decoder work in dtypes, and on devices, of their own; so they
        do their part outside.
        """
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        without = dict.fromkeys(self.encoders) | {"scheduler": scheduler}
        made = self.pipeline_class(**{**pipe.components, **without, **self.sampler_settings(pipe)})
        made.vae = None  # its scale was read above
        made.set_progress_bar_config(disable=True)
        return made

    def sampler_settings(self, pipe: Any) -> Mapping[str, Any]:
        """What else its constructor is given."""
        return {}

    def describe(self) -> dict[str, Any]:
        return {
            "family": self.name,
            "prediction_type": self.schedule.prediction_type,
            "num_timesteps": self.num_timesteps,
            **({"timesteps": list(self.timesteps)} if self.timesteps else {}),
        }


def refuse_other_channels(pipe: Any, given: str) -> None:
    """Raise `ConfigError` for inpainting and edit models, and those that learn their variance."""
    latent = pipe.vae.config.latent_channels
    taken, made = pipe.unet.config.in_channels, pipe.unet.config.out_channels
    if taken != latent or made != latent:
        raise ConfigError(
            f"The UNet must take and give the VAE's {latent} latent channels; the one of "
            f"{given} takes {taken}, as inpainting and edit models do, or gives {made}. Use "
            "the text-to-image base."
        )


def refuse_incomplete(pipe: Any, given: str, parts: Sequence[str], model: str) -> None:
    """Raise `ConfigError` where parts are missing, or a tokenizer does not fit its encoder."""
    missing = [name for name in parts if getattr(pipe, name) is None]
    if missing:
        raise ConfigError(
            f"{model} policies need {', '.join(parts)}; {given} lacks {', '.join(missing)}. Load "
            "the whole pipeline."
        )
    for tokenizer in (part for part in parts if part.startswith("tokenizer")):
        encoder = tokenizer.replace("tokenizer", "text_encoder")
        limit = getattr(pipe, tokenizer).model_max_length
        positions = getattr(pipe, encoder).config.max_position_embeddings
        if limit > positions:
            raise ConfigError(
                f"{tokenizer} must cut prompts to the {positions} tokens that {encoder} reads; "
                f"that of {given} says model_max_length={limit}. Are its files whole? Set "
                f"model_max_length to {positions}."
            )
