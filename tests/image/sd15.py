"""Tiny pipelines in the layout of Stable Diffusion 1.5 and 2.1."""

from __future__ import annotations

from typing import Any

import torch

from tests.image.conftest import TOKENS, make_tokenizer


def make_sd15(*, version: str = "1.5", sample_size: int = 8) -> Any:
    """A `StableDiffusionPipeline`: one encoder, attention in all levels but the last.

    "2.1" predicts v and projects by linear layers, as the published model does.
    """
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    second = version == "2.1"
    unet = diffusers.UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4) if second else 2,
        norm_num_groups=8,
        cross_attention_dim=16,
        use_linear_projection=second,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=2 * sample_size,
    )
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_attention_heads=2,
            num_hidden_layers=2,
            max_position_embeddings=TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    schedule = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction" if second else "epsilon",
        clip_sample=False,
        steps_offset=1,
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=schedule,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
