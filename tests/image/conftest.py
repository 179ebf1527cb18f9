"""Tiny randomly initialised SDXL pipelines, and pictures to go with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

WORDS = ["a", "the", "red", "green", "blue", "circle", "square", "on", "big", "cat", "dog", "house"]
TOKENS = 16


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """diffusers' Euler scheduler meets numpy's new copy keyword; nothing of ours can avoid it."""
    message = "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings(message))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_tokenizer() -> Any:
    """Whole words, the rest letter by letter; CLIP's beginning, end and padding."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merge = (parts[-2], parts[-1])
            if merge not in merges:
                merges.append(merge)
            parts[-2:] = ["".join(merge)]
            if parts[-1] not in tokens:
                tokens.append(parts[-1])
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        model_max_length=TOKENS,
        pad_token="<|endoftext|>",
    )


def make_pipeline(
    *,
    vae_levels: int = 2,
    prediction_type: str = "epsilon",
    sample_size: int = 8,
    force_zeros: bool = True,
    scheduler: str = "EulerDiscreteScheduler",
    latent_channels: int = 4,
    width: int = 32,
    beta_end: float = 0.012,
    layers: int = 1,
    levels: int = 2,
    pooled: int = 20,
    time_features: int = 8,
    linear_projection: bool = True,
) -> Any:
    """An SDXL pipeline of about 100,000 parameters; `vae_levels` 2 halves, 3 quarters."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer = make_tokenizer()

    def text_config(hidden: int, projection: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_attention_heads=2,
            num_hidden_layers=2,
            max_position_embeddings=TOKENS,
            projection_dim=projection,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )

    unet = diffusers.UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(16, *(width,) * (levels - 1)),
        layers_per_block=layers,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * (levels - 1)),
        up_block_types=(*("CrossAttnUpBlock2D",) * (levels - 1), "UpBlock2D"),
        transformer_layers_per_block=(*range(1, levels), 1),
        attention_head_dim=(2, *(4,) * (levels - 1)),
        norm_num_groups=8,
        cross_attention_dim=16 + 24,
        use_linear_projection=linear_projection,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_features,
        projection_class_embeddings_input_dim=6 * time_features + pooled,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,) * vae_levels,
        down_block_types=("DownEncoderBlock2D",) * vae_levels,
        up_block_types=("UpDecoderBlock2D",) * vae_levels,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=sample_size * 2 ** (vae_levels - 1),
        scaling_factor=0.13025,
    )
    schedule = getattr(diffusers, scheduler)(
        beta_start=0.00085,
        beta_end=beta_end,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text_config(16, 16)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(24, pooled)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=make_tokenizer(),
        unet=unet.eval(),
        scheduler=schedule,
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved epsilon pipeline: VAE factor 2, 8 x 8 latents, 16 px."""
    folder = tmp_path_factory.mktemp("sdxl")
    make_pipeline().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture
def pipe() -> Any:
    """The same pipeline in memory, fresh for each test."""
    return make_pipeline()


def picture(seed: int, width: int = 24, height: int = 20) -> Image.Image:
    """A smooth random picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


SIZES = [(24, 20), (16, 16), (20, 32), (40, 18), (16, 24), (33, 17), (18, 18), (21, 30)]


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """Eight pairs in memory, of mixed sizes."""
    prompts = ["a red circle", "a blue square on the house", "", "big cat", "a red circle"]
    return [
        {
            "prompt": prompts[i % len(prompts)],
            "chosen": picture(2 * i, *SIZES[i]),
            "rejected": picture(2 * i + 1, *SIZES[-1 - i]),
        }
        for i in range(8)
    ]


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    """Writes rows as metadata.jsonl; PIL images become PNG files beside it."""

    def write(rows: list[dict[str, Any]]) -> Path:
        lines = []
        for number, row in enumerate(rows):
            line = dict(row)
            for column, value in row.items():
                if isinstance(value, Image.Image):
                    line[column] = f"{column}_{number}.png"
                    value.save(tmp_path / line[column])
            lines.append(json.dumps(line))
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
        return tmp_path

    return write


BUILD = {"device": "cpu", "precision": "fp32", "gradient_checkpointing": False, "seed": 0}
