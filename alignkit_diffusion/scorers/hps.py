"""HPSv2: an open_clip ViT-H-14 that was fine-tuned on human preferences.

    score = 100 * cos(image embedding, text embedding)

Wu et al. 2023 (2306.09341). v2 and v2.1 share the architecture, and their scores differ by 2 to 3
points: the weights decide which one it is, and a report that compares them must say so.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors import safe_open
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit_diffusion.scorers.base import Scorer, find_weights, unique

ARCHITECTURE = "ViT-H-14"
WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"


def load_hpsv2(
    weights: str | None = None,
    *,
    architecture: str = ARCHITECTURE,
    device: torch.device | str = "cpu",
) -> Scorer:
    """HPSv2 or v2.1.

    Args:
        weights: a .safetensors file with open_clip's keys; or a folder or hub name with
            `open_clip_model.safetensors`, and `open_clip_config.json` if the model is not a
            ViT-H-14.
        architecture: open_clip's name of the model, where no config says it.
        device: where it computes.

    Raises:
        ConfigError: there are no such weights, or they are of another architecture.
    """
    import open_clip

    if weights is None:
        raise ConfigError(
            "The scorer 'hpsv2' needs its weights named: they are published as .pt files only "
            "(xswu/HPSv2), and those are not read. Convert the entry 'state_dict' of one to "
            ".safetensors, and give hpsv2=PATH."
        )
    file = find_weights("hpsv2", weights, WEIGHTS)
    described = (file.parent / CONFIG).is_file()
    name = f"local-dir:{file.parent}" if described else architecture
    given = {} if described else {"pretrained": str(file)}
    if lacking := _lacking(file, name):
        raise ConfigError(
            f"The weights of 'hpsv2' must be of the architecture {name!r}; {file} lacks {lacking} "
            "of its tensors. Give HPSv2's own weights, with open_clip's keys."
        )
    try:
        model: Any = open_clip.create_model(name, output_dict=True, precision="fp32", **given)
    except RuntimeError as error:
        raise ConfigError(
            f"The weights of 'hpsv2' must be of the architecture {name!r}; {file} is not: {error}"
        ) from error
    model = model.to(device).eval().requires_grad_(False)
    tokenize = open_clip.get_tokenizer(name)
    prepare = _preparation(model)

    def score(prompts: list[str], images: list[Image]) -> Tensor:
        texts, place = unique(prompts)
        pixels = torch.stack([prepare(image) for image in images]).to(device)  # (B, 3, H, W)
        found = model(pixels, tokenize(texts).to(device))
        return 100 * (found["image_features"] * found["text_features"][place]).sum(-1)

    return Scorer("hpsv2", "100 times cosine of image and prompt", [model], score)


def _lacking(file: Path, name: str) -> int:
    """How many tensors of the architecture a file does not hold, told without making any."""
    import open_clip

    with torch.device("meta"):
        expected = open_clip.create_model(name, device="meta", load_weights=False).state_dict()
    with safe_open(file, "pt") as held:
        return len(set(expected) - set(held.keys()))


def _preparation(model: Any) -> Any:
    """Pixels as the model was trained on: the longer side fits, the rest is black."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    shape = PreprocessCfg(**model.visual.preprocess_cfg)
    return image_transform_v2(replace(shape, resize_mode="longest", fill_color=0), is_train=False)
