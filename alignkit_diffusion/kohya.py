"""The adapter file that kohya's scripts, ComfyUI and the AUTOMATIC1111 interface read.

Its layers have the names of SDXL's first release (Stability's generative-models), not those of
diffusers: `input_blocks.4.1` is what diffusers calls `down_blocks.1.attentions.0`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
"""Layers outside the blocks."""
RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
SAMPLERS = {"downsamplers": "op", "upsamplers": "conv"}
BLOCK = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)")


def kohya_state(unet: Any, name: str) -> dict[str, Tensor]:
    """An adapter under kohya's names: lora_unet_<layer>.lora_down.weight, .lora_up.weight, .alpha.

    Its readers scale by alpha / rank, whatever the kind was; so alpha here is scale times rank.
    """
    from peft.tuners.lora import LoraLayer

    state = {}
    for layer_name, layer in unet.named_modules():
        if not isinstance(layer, LoraLayer) or name not in layer.lora_A:
            continue
        prefix = "lora_unet_" + original_name(layer_name, unet).replace(".", "_")
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        state[f"{prefix}.lora_down.weight"] = down.detach().cpu().contiguous()
        state[f"{prefix}.lora_up.weight"] = up.detach().cpu().contiguous()
        state[f"{prefix}.alpha"] = torch.tensor(float(layer.scaling[name] * layer.r[name]))
    return state


def original_name(layer: str, unet: Any) -> str:
    """The first release's name of a layer; of a UNet that is not built like SDXL's, diffusers'."""
    if layer in OUTSIDE:
        return OUTSIDE[layer]
    match = BLOCK.fullmatch(layer)
    if match is None or not _is_built_like_sdxl(unet):
        return layer
    side, number, kind, place, rest = match.groups()
    if kind == "resnets":
        rest = RESNET.get(rest, rest)
    if side == "mid":
        # A residual block, a transformer, a residual block.
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(place)}.{rest}"
    block, size = int(number), unet.config.layers_per_block + 1
    if kind in SAMPLERS:
        rest = SAMPLERS[kind]
        # A block of the way down ends with a place of its own for it, one of the way up shares.
        if side == "down":
            return f"input_blocks.{size * (block + 1)}.0.{rest}"
        return f"output_blocks.{size * block + size - 1}.2.{rest}"
    inner = int(kind == "attentions")
    if side == "down":
        return f"input_blocks.{1 + size * block + int(place)}.{inner}.{rest}"
    return f"output_blocks.{size * block + int(place)}.{inner}.{rest}"


def _is_built_like_sdxl(unet: Any) -> bool:
    """As many layers in every block, and a transformer before every upsampler."""

    def plain(block: nn.Module) -> bool:
        return not getattr(block, "upsamplers", None) or hasattr(block, "attentions")

    return isinstance(unet.config.layers_per_block, int) and all(map(plain, unet.up_blocks))
