"""Scorers in the format of transformers' CLIP: CLIP score and PickScore.

    score = scale * cos(image embedding, text embedding)

CLIP score: Hessel et al. 2021 (2104.08718), with scale 100 and without their clamp at 0. PickScore:
Kirstain et al. 2023 (2305.01569), eq. 1, with the model's own scale (about 100); the probability
that image a is preferred to b is the sigmoid of the difference of their scores (eq. 2).
"""

from __future__ import annotations

from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.places import is_missing
from alignkit_diffusion.scorers.base import Scorer, unique

CLIP = "openai/clip-vit-large-patch14"
PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def load_clip(weights: str = CLIP, *, device: torch.device | str = "cpu") -> Scorer:
    """CLIP score: 100 times the cosine of image and prompt.

    Args:
        weights: a folder or hub name with a `CLIPModel` and its processor.
        device: where it computes.

    Raises:
        ConfigError: there is no such model.
    """
    model, processor = clip_model("clip", weights, device=device)
    return _scorer("clip", "100 times cosine of image and prompt", model, processor, 100.0)


def load_pickscore(
    weights: str = PICKSCORE,
    *,
    processor: str | None = None,
    device: torch.device | str = "cpu",
) -> Scorer:
    """PickScore: the logit of a CLIP-H that was fine-tuned on Pick-a-Pic.

    Args:
        weights: a folder or hub name with a `CLIPModel`.
        processor: where its processor is; None looks beside the weights and then takes the one it
            was trained with.
        device: where it computes.

    Raises:
        ConfigError: there is no such model.
    """
    model, found = clip_model(
        "pickscore", weights, processor=processor, other=PICKSCORE_PROCESSOR, device=device
    )
    scale = float(model.logit_scale.detach().exp())
    return _scorer("pickscore", "nats: a difference is a log-odds", model, found, scale)


def clip_model(
    name: str,
    weights: str,
    *,
    processor: str | None = None,
    other: str | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Any, Any]:
    """A frozen float32 `CLIPModel` and its processor.

    Raises:
        ConfigError: one of them is not there.
    """
    from transformers import CLIPModel, CLIPProcessor

    if is_missing(weights):
        raise ConfigError(f"The weights of {name!r} must exist; there is no folder {weights!r}.")
    try:
        model = CLIPModel.from_pretrained(weights, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The scorer {name!r} needs a CLIPModel in safetensors at {weights!r}: {error}"
        ) from error
    try:
        found = CLIPProcessor.from_pretrained(processor or weights)
    except (OSError, ValueError) as error:
        if processor is not None or other is None:
            raise ConfigError(
                f"The scorer {name!r} needs a CLIPProcessor at {processor or weights!r}: {error}"
            ) from error
        return clip_model(name, weights, processor=other, device=device)
    return model.to(device).eval().requires_grad_(False), found


def _scorer(name: str, unit: str, model: Any, processor: Any, scale: float) -> Scorer:
    def score(prompts: list[str], images: list[Image]) -> Tensor:
        texts, place = unique(prompts)
        length = model.config.text_config.max_position_embeddings
        inputs = processor(
            text=texts, images=images, return_tensors="pt",
            padding=True, truncation=True, max_length=length,
        ).to(model.device)  # fmt: skip
        found = model(**inputs)
        text, image = found.text_embeds[place], found.image_embeds  # (B, D), of length 1
        return scale * (text.float() * image.float()).sum(-1)

    return Scorer(name, unit, [model], score)
