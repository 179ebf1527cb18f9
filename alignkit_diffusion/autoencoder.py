"""Pixels to latents and back, in float32.

SDXL's VAE overflows in float16 and rounds visibly in bfloat16, so a pipeline loaded in half
precision keeps its VAE's float32 weights here; the pipeline's own VAE is never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.errors import ConfigError

PIXELS_PER_CALL = 4 * 1024 * 1024
IMAGES_PER_CALL = 32


class Autoencoder:
    """A VAE and the affine map between its latents and what the UNet sees.

    Args:
        vae: a diffusers `AutoencoderKL`, in any dtype and on any device; it is only read.
        device: where encoding and decoding happen.
        load: called before the first of them, for a VAE whose weights are still on disk.

    Raises:
        ConfigError: it is another kind of autoencoder.
    """

    def __init__(
        self, vae: Any, device: torch.device, load: Callable[[], None] = lambda: None
    ) -> None:
        if not hasattr(vae.config, "latent_channels") or not hasattr(vae, "quant_conv"):
            raise ConfigError(
                "Image policies need an AutoencoderKL; the pipeline's VAE is a "
                f"{type(vae).__name__}. Give the pipeline the VAE that its UNet was trained with."
            )
        self._vae = vae
        self._device = device
        self._load = load
        self._ready: nn.Module | None = None

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side: every level of the encoder but the last halves."""
        return 2 ** (len(self._vae.config.block_out_channels) - 1)

    def batch_size(self, height: int, width: int) -> int:
        """How many images of this size one call takes."""
        return max(1, min(IMAGES_PER_CALL, PIXELS_PER_CALL // (height * width)))

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents (N, C, h, w) of pixels (N, 3, H, W) in [-1, 1], float32 on the CPU.

        The mean of the posterior, so that an image has one latent: at the scale of SDXL's
        posterior, sampling it adds noise far below what the first timestep adds.
        """
        return self.posterior(pixels)[0]

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of pixels, as `encode` has them."""
        found = self._module().encode(pixels.to(self._device)).latent_dist
        shift, scale = self._affine()
        return ((found.mean.cpu() - shift) * scale).float(), (found.std.cpu() * scale).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in [-1, 1], not clipped, of latents (N, C, h, w); on the CPU."""
        shift, scale = self._affine()
        inner = latents.float().cpu() / scale + shift
        return self._module().decode(inner.to(self._device)).sample.cpu()

    def release(self) -> None:
        """Free what was copied; a later call copies again."""
        self._ready = None

    def _affine(self) -> tuple[Tensor, Tensor]:
        # latents = (mean - shift) * scale, per channel where the VAE's config has statistics.
        config = self._vae.config
        scale = torch.tensor(float(config.scaling_factor))
        shift = torch.tensor(float(getattr(config, "shift_factor", None) or 0.0))
        means, stds = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        if means is not None and stds is not None:
            shift = shift + torch.tensor(means, dtype=torch.float32).view(1, -1, 1, 1)
            scale = scale / torch.tensor(stds, dtype=torch.float32).view(1, -1, 1, 1)
        return shift, scale

    def _module(self) -> Any:
        if self._ready is None:
            self._load()
            first = next(self._vae.parameters())
            there = first.device == torch.empty(0, device=self._device).device
            if there and first.dtype == torch.float32 and not self._vae.training:
                self._ready = self._vae
            else:
                fresh = copy.deepcopy(self._vae)
                self._ready = nn.Module.to(fresh, self._device, torch.float32).eval()
        return self._ready
