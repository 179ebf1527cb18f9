"""LAION's aesthetic predictors: linear maps of CLIP-L's image embedding to a mark from 1 to 10.

    score = W_n (... (W_1 e + b_1) ...) + b_n,      e = embedding / |embedding|

Schuhmann et al. 2022 (2210.08402). The "improved" predictor has five layers with nothing between
them, the first one a single layer. They do not look at the prompt.
"""

from __future__ import annotations

import torch
from PIL.Image import Image
from torch import Tensor, nn

from alignkit.errors import ConfigError
from alignkit_diffusion.scorers.base import Scorer, find_weights
from alignkit_diffusion.scorers.clip import CLIP, clip_model

WEIGHTS = "model.safetensors"


def load_aesthetic(
    weights: str | None = None,
    *,
    clip: str = CLIP,
    device: torch.device | str = "cpu",
) -> Scorer:
    """The aesthetic mark, about 1 to 10.

    Args:
        weights: a .safetensors file with `layers.N.weight` and `layers.N.bias`, or `weight` and
            `bias` of one layer; or a folder or hub name with such a `model.safetensors`. The form
            "HEAD+CLIP" names the CLIP, too.
        clip: a folder or hub name with the `CLIPModel` whose embeddings the layers were fitted on.
        device: where it computes.

    Raises:
        ConfigError: there are no such weights, or they do not fit the CLIP.
    """
    if weights is None:
        raise ConfigError(
            "The scorer 'aesthetic' needs its weights named: they are published as .pth files. "
            "Convert one to .safetensors, and give aesthetic=PATH, or aesthetic=PATH+CLIP where "
            f"CLIP is not {CLIP!r}."
        )
    weights, _, other = weights.partition("+")
    model, processor = clip_model("aesthetic", other or clip, device=device)
    head = _head(weights, model.config.projection_dim).to(device)

    def score(prompts: list[str], images: list[Image]) -> Tensor:
        pixels = processor(images=images, return_tensors="pt").to(model.device)
        found = model.visual_projection(model.vision_model(**pixels).pooler_output)  # (B, D)
        return head(nn.functional.normalize(found.float(), dim=-1)).squeeze(-1)

    return Scorer("aesthetic", "mark from 1 to 10", [model, head], score)


def _head(weights: str, size: int) -> nn.Sequential:
    """The layers, in the order of their numbers.

    Raises:
        ConfigError: they are no chain from `size` numbers to one.
    """
    from safetensors.torch import load_file

    found = load_file(find_weights("aesthetic", weights, WEIGHTS))
    names = sorted(
        (key.removesuffix(".weight") for key in found if key.endswith(".weight")), key=_number
    )
    names = names or [""]
    layers = []
    for name in names:
        weight = found.get(f"{name}.weight" if name else "weight")
        bias = found.get(f"{name}.bias" if name else "bias")
        if weight is None or bias is None or weight.ndim != 2 or weight.shape[1] != size:
            shape = None if weight is None else tuple(weight.shape)
            raise ConfigError(
                "The layers of 'aesthetic' lead from the CLIP's embedding to one number, each with "
                f"weight and bias; layer {name!r} of {weights!r} must take {size} numbers and is "
                f"{shape}. Give the CLIP they were fitted on, as aesthetic=PATH+CLIP."
            )
        layer = nn.Linear(size, weight.shape[0])
        layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
        layers.append(layer)
        size = weight.shape[0]
    if size != 1:
        raise ConfigError(
            f"The layers of 'aesthetic' end in one number; {weights!r} ends in {size}."
        )
    return nn.Sequential(*layers).eval().requires_grad_(False)


def _number(name: str) -> int:
    last = name.rpartition(".")[2]
    return int(last) if last.isdigit() else 0
