"""The policy: a diffusers pipeline from a folder, the hub, or the caller's hands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignkit.errors import ConfigError, refuse_unknown
from alignkit.memory import align_memory
from alignkit_diffusion.borrowed import Borrowed
from alignkit_diffusion.families import Family, check_class, family_of
from alignkit_diffusion.parts import Parts
from alignkit_diffusion.unloaded import (
    LAZY,
    is_shell,
    place_of,
    read_aligned,
    shells_of,
    unloaded,
    variant,
    weight_files,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Policy:
    """A pipeline ready to be given an adapter or to be trained whole.

    Attributes:
        pipe: the pipeline; its UNet is on the device, everything else where it was.
        parts: what of it is loaded when it is needed.
        family: how its UNet is conditioned and what it predicts.
        name: the folder or hub name, or None for a pipeline in memory.
        borrowed: how the UNet of a pipeline in memory came; None for one that was loaded here.
        channels_last: whether the UNet's convolutions have channels innermost while it trains.
    """

    pipe: Any
    parts: Parts
    family: Family
    name: str | None
    borrowed: Borrowed | None
    channels_last: bool = False
    _given_back: bool = False

    def give_back(self) -> None:
        """Leave a pipeline in memory as it came, and one that was loaded here ready to be called.

        Training needs the UNet alone on the device; a call needs all parts there.
        """
        self._given_back = True
        if self.borrowed is not None:
            if self.channels_last:
                nn.Module.to(self.pipe.unet, memory_format=torch.contiguous_format)
            self.borrowed.give_back()
        else:
            self._move_rest(next(self.pipe.unet.parameters()).device)

    def take_again(self) -> None:
        """Undo `give_back`."""
        self._given_back = False
        if self.borrowed is not None:
            self.borrowed.take_again()
            if self.channels_last:
                nn.Module.to(self.pipe.unet, memory_format=torch.channels_last)
        else:
            self._move_rest(torch.device("cpu"))

    def _move_rest(self, device: torch.device) -> None:
        for name, part in self.pipe.components.items():
            if name != "unet" and isinstance(part, nn.Module) and not is_shell(part):
                nn.Module.to(part, device)

    def whole(self) -> Any:
        """The pipeline with all its weights, as users have it."""
        self.parts.fill()
        if self.borrowed is None and self._given_back:
            self._move_rest(next(self.pipe.unet.parameters()).device)
        return self.pipe


def load_policy(
    policy: Any,
    *,
    precision: str,
    whole: bool,
    device: torch.device,
    channels_last: bool | str = "auto",
    unet: bool = True,
) -> Policy:
    """Load or adopt a pipeline and put its UNet on `device`.

    Args:
        policy: a diffusers folder, a hub name, or a `DiffusionPipeline`.
        precision: "fp32", "bf16" or "fp16". What is loaded frozen is kept in it. Weights in hand
            keep their dtype, unless they are trained or computed with in float32.
        whole: the UNet itself is trained, and so has float32 master values.
        device: of the UNet.
        channels_last: "auto" is on GPUs.
        unet: False leaves the UNet of a folder on disk, for what does not need it.

    Raises:
        ConfigError: there is no such pipeline, it cannot be loaded from safetensors files, or no
            family serves it.
    """
    refuse_unknown("precision", precision, DTYPES)
    dtype = torch.float32 if whole else DTYPES[precision]
    if isinstance(policy, str | Path):
        pipe, parts = _load(str(policy), dtype, unet)
        name: str | None = str(policy)
    else:
        pipe, name = policy, None
        parts = Parts(pipe, getattr(pipe, "vae", None))
    given = f"the pipeline {name!r}" if name else "the pipeline in memory"
    family = family_of(pipe, given)
    borrowed = None
    if name is None:
        _refuse_hooks(pipe)
        borrowed = Borrowed(pipe.unet)
        if dtype == torch.float32:
            nn.Module.to(pipe.unet, dtype)  # diffusers' own `to` warns of every cast
    channels_last = device.type == "cuda" if channels_last == "auto" else bool(channels_last)
    if not is_shell(pipe.unet):
        nn.Module.to(pipe.unet, device)
        if channels_last:
            nn.Module.to(pipe.unet, memory_format=torch.channels_last)
        if parts.folder is not None:
            read_aligned(pipe.unet, weight_files(parts.folder, "unet"))
        align_memory(pipe.unet)
    return Policy(pipe, parts, family, name, borrowed, channels_last)


def _load(name: str, dtype: torch.dtype, unet: bool) -> tuple[Any, Parts]:
    from diffusers import DiffusionPipeline

    try:
        # A few hundred bytes say what the pipeline is, before gigabytes are fetched.
        index = DiffusionPipeline.load_config(name)
    except Exception as error:  # the hub client, the network and the file system all raise here
        raise ConfigError(
            "An image policy is a diffusers folder (with model_index.json), a hub name, or a "
            f"pipeline in memory; {name!r} could not be read as one: {error}"
        ) from error
    check_class(str(index.get("_class_name")), repr(name))
    try:
        folder = place_of(name)
        lazy = LAZY if unet else (*LAZY, "unet")
        shells = shells_of(folder, index, lazy, dtype)
        pipe = DiffusionPipeline.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            variant=variant(folder, "unet"),
            **{part: found.shell for part, found in shells.items()},
        )
        vae = shells.get("vae")
        if vae is not None and dtype != torch.float32:
            # Users call the pipeline without autocast, so all of it has one dtype; what encodes for
            # training is another, exact one.
            library, cls = index["vae"]
            vae = unloaded(folder, "vae", library, cls, torch.float32)
    except Exception as error:  # missing and broken weights have no common class
        raise ConfigError(
            f"The pipeline {name!r} must load from .safetensors files: {error} Where there are "
            "others, write such ones with pipe.save_pretrained(folder)."
        ) from error
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    return pipe, Parts(pipe, None if vae is None else vae.shell, folder, shells, vae)


def refuse_incomparable(reference: Policy, pipe: Any, family: Family) -> None:
    """Raise `ConfigError` unless a reference can be compared with the policy `pipe`."""
    found = family.differences(pipe.unet, reference.family, reference.pipe.unet)
    if found:
        raise ConfigError(
            "Policy and reference denoise the same noised latents under the same prompts, so they "
            f"must agree in what they take and predict; they have {', '.join(found)}. Give a "
            "reference of the policy's own lineage."
        )


def _refuse_hooks(pipe: Any) -> None:
    if any(hasattr(module, "_hf_hook") for module in (pipe.unet, pipe.vae, pipe.text_encoder)):
        raise ConfigError(
            "A pipeline in memory must be free of offloading hooks, which move weights during "
            "training; this one has them. Call pipe.remove_all_hooks() first."
        )


def factor_of(pipe: Any, autoencoder_factor: int) -> int:
    """What heights and widths in pixels must be multiples of.

    The VAE halves `autoencoder_factor`, and the UNet once per level but the last; sides that do not
    divide would be padded inside, which the likelihood does not expect.
    """
    return autoencoder_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)


def native_size(pipe: Any, autoencoder_factor: int) -> tuple[int, int]:
    """(height, width) in pixels that the UNet was trained for."""
    size = pipe.unet.config.sample_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return height * autoencoder_factor, width * autoencoder_factor
