"""An adapter and its base as one pipeline folder, which needs no peft."""

from __future__ import annotations

from pathlib import Path

import torch

from alignkit.errors import ConfigError
from alignkit.options import LoRA
from alignkit_diffusion import lora
from alignkit_diffusion.conditioning import quiet_libraries
from alignkit_diffusion.policy import load_policy


@torch.no_grad()
def save_merged(adapter: str, out: Path, base: str) -> None:
    """Write a folder that `DiffusionPipeline.from_pretrained` loads, in float32.

    Args:
        adapter: a folder or file as `LoRA.continue_from` takes it.
        out: the folder.
        base: the pipeline that the adapter was trained on.

    Raises:
        ConfigError: one of them cannot be loaded, they do not fit, or the sum is not finite.
    """
    policy = load_policy(base, precision="fp32", whole=False, device=torch.device("cpu"))
    unet = policy.pipe.unet
    loader = policy.family.pipeline_class
    lora.give_adapter(unet, LoRA(continue_from=adapter), seed=0, loader=loader)
    try:
        with quiet_libraries():
            unet.fuse_lora(safe_fusing=True)
    except ValueError as error:
        raise ConfigError(
            f"The adapter {adapter!r} cannot be merged into {base!r}: {error}"
        ) from error
    lora.remove_adapter(unet)
    policy.whole().save_pretrained(out, safe_serialization=True)
