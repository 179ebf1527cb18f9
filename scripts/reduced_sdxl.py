"""SDXL at a fifth of its width, with the true proportions of work between its parts.

At 1024 px the published model's VAE encodes an image in 4.88 TFLOP, its UNet takes 6.76 to denoise
it, and its text encoders 0.11 for a prompt. Widths and sides are reduced so that these proportions
hold to a hundredth, which `proportions` counts. Weights are random, the same from the same seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

TRUE_PROPORTIONS = {"vae": 4.88 / 6.76, "text": 0.11 / 6.76}
"""Of one image's encoding, and one prompt's, to one image's forward of the UNet."""
TOKENS = 77
HEAD = 64


@dataclass(frozen=True)
class Shape:
    """Sizes of the parts.

    Attributes:
        side: of the pictures, in pixels.
        widths: channels of the UNet's levels; (320, 640, 1280) in the published one.
        depths: transformers per block of a level; (1, 2, 10) there.
        vae: channels of the VAE's levels; (128, 256, 512, 512) there.
        hidden: widths of the two text encoders.
        layers: how many each has.
        time: features of one size number; 256 there.
    """

    side: int = 320
    widths: tuple[int, ...] = (64, 128, 256)
    depths: tuple[int, ...] = (1, 2, 10)
    vae: tuple[int, ...] = (24, 56, 112, 112)
    hidden: tuple[int, int] = (128, 256)
    layers: tuple[int, int] = (2, 3)
    time: int = 64

    @property
    def latent(self) -> int:
        return self.side // 8


REDUCED = Shape()
QUICK = Shape(64, (64, 64, 64), (1, 1, 1), (8, 8, 8, 8), (64, 64), (2, 2))
"""For a look whether everything runs; its proportions mean nothing."""


def unet(shape: Shape) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=shape.latent,
        block_out_channels=shape.widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=shape.depths,
        attention_head_dim=tuple(width // HEAD for width in shape.widths),
        cross_attention_dim=sum(shape.hidden),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=shape.time,
        projection_class_embeddings_input_dim=6 * shape.time + shape.hidden[1],
    )


def vae(shape: Shape) -> Any:
    from diffusers import AutoencoderKL

    levels = len(shape.vae)
    return AutoencoderKL(
        block_out_channels=shape.vae,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=2,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=shape.side,
        scaling_factor=0.13025,
    )


def text_encoder(shape: Shape, number: int, tokenizer: Any) -> Any:
    """The first or the second, 0 or 1."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    hidden = shape.hidden[number]
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_attention_heads=hidden // HEAD,
        num_hidden_layers=shape.layers[number],
        max_position_embeddings=TOKENS,
        projection_dim=hidden,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModel, CLIPTextModelWithProjection)[number](config)


def scheduler(kind: str = "EulerDiscreteScheduler") -> Any:
    """SDXL's noise schedule."""
    import diffusers

    return getattr(diffusers, kind)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )


def frozen(make: Callable[[], Any], seed: int) -> Any:
    """A part with random weights, for evaluation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval().requires_grad_(False)


class _Words:
    """A tokenizer of as many tokens as matter to a count of arithmetic, which reads no table."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 1

    def __len__(self) -> int:
        return 2


def proportions(shape: Shape) -> dict[str, float]:
    """GFLOP of each part, for one image or prompt, counted on torch's meta device."""
    with torch.device("meta"):
        denoiser, encoder = unet(shape).eval(), vae(shape).eval()
        readers = [text_encoder(shape, number, _Words()).eval() for number in (0, 1)]
        pixels = torch.empty(1, 3, shape.side, shape.side)
        ids = torch.zeros(1, TOKENS, dtype=torch.int64)
        added = {"text_embeds": torch.empty(1, shape.hidden[1]), "time_ids": torch.empty(1, 6)}
        given = {
            "sample": torch.empty(1, 4, shape.latent, shape.latent),
            "timestep": torch.zeros(1, dtype=torch.int64),
            "encoder_hidden_states": torch.empty(1, TOKENS, sum(shape.hidden)),
            "added_cond_kwargs": added,
        }
        return {
            "unet": gflops(lambda: denoiser(**given)),
            "vae": gflops(lambda: encoder.encode(pixels)),
            "text": sum(gflops(lambda reader=reader: reader(ids)) for reader in readers),
        }


def gflops(call: Callable[[], Any]) -> float:
    """Of one call; a multiplication with its addition is 2."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() / 1e9
