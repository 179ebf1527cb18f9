"""A small PickScore: a CLIP in transformers' layout, fitted by Bradley-Terry on preference pairs.

    P(first is better) = sigmoid(s_0 - s_1),   s = scale * cos(image, prompt)    (2305.01569, eq. 1)

It begins at random weights and sees the rows' labels alone, errors and ties included.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

SIDE, PATCH = 64, 8
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
BATCH, RATE, FIRST_SCALE = 64, 1e-3, 10.0


def fit_scorer(
    rows: Sequence[dict[str, Any]],
    labels: str,
    tokenizer: Path,
    out: Path,
    *,
    steps: int,
    seed: int,
) -> Path:
    """Fit a CLIP on one column of labels and write it with its processor.

    Args:
        rows: from `relation_world`.
        labels: the column, 1 where the first picture is better.
        tokenizer: a folder of a CLIP tokenizer.
        out: a folder that `alignkit label images --scorer pickscore=OUT` takes.
        steps: of `BATCH` pairs.
        seed: of weights and order.
    """
    torch.manual_seed(seed)
    words = CLIPTokenizer.from_pretrained(tokenizer)
    model = CLIPModel(_config(words))
    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    processor = CLIPProcessor(images, words)
    pictures = torch.stack([_pictures(row, images) for row in rows])  # (N, 2, 3, H, W)
    text = words([row["caption"] for row in rows], return_tensors="pt", padding=True)
    target = torch.tensor([row[labels] for row in rows])
    with torch.no_grad():
        model.logit_scale.fill_(math.log(FIRST_SCALE))
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        picked = torch.randint(len(rows), (BATCH,), generator=draw)
        seen = pictures[picked]
        for axis in (-1, -2):  # a mirrored picture is as good
            if torch.rand((), generator=draw) < 0.5:
                seen = seen.flip(axis)
        asked = {name: text[name][picked] for name in ("input_ids", "attention_mask")}
        loss = functional.binary_cross_entropy_with_logits(_gap(model, seen, asked), target[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out


def accuracy(rows: Sequence[dict[str, Any]], scores: Sequence[float], labels: str) -> float:
    """Share of the rows without ties whose better picture scores higher.

    Args:
        scores: of the first and the second picture of each row in turn.
    """
    gaps = np.array(scores).reshape(-1, 2) @ [1.0, -1.0]
    wanted = np.array([row[labels] for row in rows])
    told = wanted != 0.5
    return float(np.mean((gaps[told] > 0) == (wanted[told] > 0.5)))


def _config(words: CLIPTokenizer) -> CLIPConfig:
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    text = {"vocab_size": len(words), "max_position_embeddings": 32, "num_hidden_layers": 1}
    vision = {"image_size": SIDE, "patch_size": PATCH, "num_hidden_layers": 3}
    return CLIPConfig(
        text_config=TOWER | text | ends, vision_config=TOWER | vision, projection_dim=32
    )


def _pictures(row: dict[str, Any], images: CLIPImageProcessor) -> Tensor:
    """Both pictures of a row, (2, 3, H, W)."""
    opened = [Image.open(io.BytesIO(row[side])).convert("RGB") for side in ("jpg_0", "jpg_1")]
    found: Tensor = images(images=opened, return_tensors="pt")["pixel_values"]
    return found


def _gap(model: CLIPModel, pictures: Tensor, text: dict[str, Tensor]) -> Tensor:
    """Score of the first picture minus that of the second, (B,)."""
    seen = model.vision_model(pixel_values=pictures.flatten(0, 1)).pooler_output
    image = functional.normalize(model.visual_projection(seen), dim=-1).view(len(pictures), 2, -1)
    prompt = functional.normalize(
        model.text_projection(model.text_model(**text).pooler_output), dim=-1
    )
    scores = model.logit_scale.exp() * (image * prompt[:, None]).sum(-1)  # (B, 2)
    return scores[:, 0] - scores[:, 1]
