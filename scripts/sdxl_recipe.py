"""One training step of the well-known SDXL Diffusion-DPO recipe, written anew from a description.

It stands for what people run today: VAE (float32, eight images a call) and text encoders in the
loop, the posterior sampled anew every step, a LoRA of rank 8 on the attention projections, gradient
checkpointing, one UNet call on both images of all pairs, the reference by switching adapters off,
four numbers read from the device every step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import reduced_sdxl as parts
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from reduced_sdxl import Shape
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTextModelWithProjection

BETA = 5000.0
VAE_BATCH = 8


class Recipe:
    """The parts and the step.

    Args:
        folder: of the pipeline.
        shape: sizes of its parts.
        checkpointing: as the recipe has it.
    """

    def __init__(self, folder: Path, shape: Shape, *, checkpointing: bool = True) -> None:
        from peft import LoraConfig

        self.shape = shape
        self.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        self.vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
        self.encoders = [
            CLIPTextModel.from_pretrained(folder, subfolder="text_encoder"),
            CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder_2"),
        ]
        for part in (self.unet, self.vae, *self.encoders):
            part.requires_grad_(False).eval()
        self.scheduler = parts.scheduler("DDPMScheduler")
        names = ["to_q", "to_k", "to_v", "to_out.0"]
        config = LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=names)
        self.unet.add_adapter(config)
        self.unet.train()
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.trained = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True)
        self.told: dict[str, float] = {}

    def double(self) -> None:
        """Compute in float64 from now on."""
        for part in (self.unet, self.vae, *self.encoders):
            part.double()

    def step(self, pixels: Tensor, ids: Tensor) -> None:
        """One optimizer step on pixels (B, 6, H, W), winner and loser, and token ids (B, 77)."""
        inside, policy, reference = self.logits(pixels, ids)
        loss = -functional.logsigmoid(inside).mean()
        accuracy = (inside > 0).sum().float() / inside.numel()
        accuracy = accuracy + 0.5 * (inside == 0).sum().float() / inside.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.told = {
            "loss": loss.detach().item(),
            "raw_model_loss": policy.mean().item(),
            "ref_loss": reference.mean().item(),
            "implicit_acc": accuracy.detach().item(),
        }

    def logits(
        self, pixels: Tensor, ids: Tensor, draws: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) logits, and the errors (2B,) of policy and reference.

        With `draws`, timesteps (B,) and noise (B, 4, h, w), nothing is random: the posterior's mean
        is taken, too.
        """
        images = torch.cat(pixels.chunk(2, dim=1))  # (2B, 3, H, W)
        latents = self._encode(images, sample=draws is None)
        num = len(latents) // 2
        if draws is None:
            noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
            timesteps = torch.randint(0, 1000, (num,)).repeat(2)
        else:
            timesteps, noise = draws[0].repeat(2), draws[1].repeat(2, 1, 1, 1)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        hidden, pooled = self._read(ids)
        side = float(self.shape.side)
        time_ids = torch.tensor([[side, side, 0, 0, side, side]]).repeat(2 * num, 1)
        given = {
            "encoder_hidden_states": hidden.repeat(2, 1, 1),
            "added_cond_kwargs": {"time_ids": time_ids, "text_embeds": pooled.repeat(2, 1)},
        }
        policy = self._errors(noisy, timesteps, noise, given)
        self.unet.disable_adapters()
        with torch.no_grad():
            reference = self._errors(noisy, timesteps, noise, given)
        self.unet.enable_adapters()
        (policy_w, policy_l), (reference_w, reference_l) = policy.chunk(2), reference.chunk(2)
        inside = -0.5 * BETA * ((policy_w - policy_l) - (reference_w - reference_l))
        return inside, policy, reference

    def _errors(self, noisy: Tensor, timesteps: Tensor, target: Tensor, given: Any) -> Tensor:
        prediction = self.unet(noisy, timesteps, **given).sample
        exact = prediction.dtype == torch.float64
        prediction, target = (one if exact else one.float() for one in (prediction, target))
        error = functional.mse_loss(prediction, target, reduction="none")
        return error.mean(dim=(1, 2, 3))

    @torch.no_grad()
    def _encode(self, images: Tensor, *, sample: bool) -> Tensor:
        posteriors = [self.vae.encode(some).latent_dist for some in images.split(VAE_BATCH)]
        latents = [one.sample() if sample else one.mean for one in posteriors]
        return torch.cat(latents) * self.vae.config.scaling_factor

    @torch.no_grad()
    def _read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        read = [encoder(ids, output_hidden_states=True) for encoder in self.encoders]
        hidden = torch.cat([one.hidden_states[-2] for one in read], dim=-1)
        return hidden, read[1].text_embeds
