"""Low-rank adapters on the UNet: which layers, fresh or continued, and the files on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from alignkit.adapters import (
    active_adapters,
    lora_config,
    refuse_contradiction,
    refuse_zero_rows,
)
from alignkit.errors import ConfigError, nearest
from alignkit.options import LoRA
from alignkit_diffusion.conditioning import quiet_libraries
from alignkit_diffusion.kohya import kohya_state

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
PRESETS = {"attention": ATTENTION, "attention+ff": ATTENTION + FEED_FORWARD}
BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
NAME = "default"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
PEFT_FILE = "adapter_model.safetensors"


def resolve_targets(unet: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The full names of the layers that `LoRA.targets` means.

    Args:
        unet: the denoiser.
        targets: "auto" and "attention+ff" (projections of attention and feed-forward), "attention",
            "all" (every linear and convolution layer of the blocks), or endings of layer names.

    Raises:
        ConfigError: a name matches no linear or convolution layer.
    """
    layers = [n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if targets == "all":
        return [name for name in layers if name.startswith(BLOCKS)]
    if isinstance(targets, str):
        endings = PRESETS["attention+ff"] if targets == "auto" else PRESETS.get(targets, (targets,))
    else:
        endings = tuple(targets)
    for ending in endings:
        if not any(_ends(name, ending) for name in layers):
            # Endings of one to three parts, which is how people write them.
            parts = [name.split(".") for name in layers]
            known = {".".join(p[-k:]) for p in parts for k in (1, 2, 3)} | {*PRESETS, "auto", "all"}
            raise ConfigError(
                "adapter.targets are 'auto', 'attention', 'attention+ff', 'all' or endings of "
                f"names of linear or convolution layers; {ending!r} matches none of this "
                f"UNet.{nearest(ending, known)}"
            )
    return [name for name in layers if any(_ends(name, ending) for ending in endings)]


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def give_adapter(unet: Any, adapter: LoRA, *, seed: int, loader: Any) -> None:
    """Put an adapter on `unet`, fresh or continued; if that fails, leave it as it was.

    `loader` is the class of the pipeline, which knows how its adapter files are laid out.

    Raises:
        ConfigError: it carries one already, or the adapter's layers or folder cannot be used.
    """
    present = adapter_name(unet)
    if present is not None:
        raise ConfigError(
            f"A new adapter needs a UNet without one; the pipeline in memory carries {present!r}. "
            "To go on training that one, give no adapter; to train a new one on top of it, fuse "
            "it first, pipe.fuse_lora(); to drop it, or after fusing, pipe.unload_lora_weights()."
        )
    try:
        if adapter.continue_from:
            continue_adapter(unet, adapter, loader)
        else:
            add_adapter(unet, adapter, seed=seed)
    except BaseException:
        remove_adapter(unet)
        raise


def add_adapter(unet: Any, adapter: LoRA, *, seed: int) -> None:
    """Add a fresh adapter, which changes nothing yet: B is zero.

    Raises:
        ConfigError: a target matches no layer; or DoRA meets a weight with a row of 0.
    """
    targets = resolve_targets(unet, adapter.targets)
    config = lora_config(adapter, targets, init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        unet.add_adapter(config, adapter_name=NAME)
    refuse_zero_rows(unet)


def remove_adapter(unet: Any) -> None:
    """Make `unet` as it was before an adapter came to it."""
    # What diffusers leaves of a failure: layers without adapters, or a flag without layers.
    if hasattr(unet, "peft_config"):
        unet.unload_lora()
    unet._hf_peft_config_loaded = False


def continue_adapter(unet: Any, adapter: LoRA, loader: Any) -> None:
    """Load an adapter as *the* adapter of `unet`; rank, alpha, kind and targets are the folder's.

    Args:
        unet: without an adapter.
        adapter: `continue_from` is a folder in diffusers' layout
            (`pytorch_lora_weights.safetensors`, or a kohya-style file) or in peft's
            (`adapter_config.json` and `adapter_model.safetensors`).
        loader: the class of the pipeline.

    Raises:
        ConfigError: the folder holds no such adapter, or one that does not fit; or another option
            asks for something else than it holds.
    """
    path = Path(str(adapter.continue_from)).expanduser()
    if (path / "adapter_config.json").is_file() and (path / PEFT_FILE).is_file():
        _continue_peft(unet, path)
    else:
        _continue_diffusers(unet, _adapter_file(path), loader)
    refuse_contradiction(unet.peft_config[NAME], adapter)


def _adapter_file(path: Path) -> Path:
    if path.is_file() and path.suffix == ".safetensors":
        return path
    named = path / DIFFUSERS_FILE
    if named.is_file():
        return named
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "no .safetensors file"
        raise ConfigError(
            f"adapter.continue_from is a folder with {DIFFUSERS_FILE}, or with "
            f"adapter_config.json and {PEFT_FILE}; {path} has "
            f"{found if path.exists() else 'no file: it does not exist'}."
        )
    return files[0]


def _continue_diffusers(unet: Any, file: Path, loader: Any) -> None:
    state, alphas, metadata = loader.lora_state_dict(
        str(file.parent),
        weight_name=file.name,
        unet_config=unet.config,
        use_safetensors=True,
        return_lora_metadata=True,
    )
    others = sorted({key.split(".")[0] for key in state} - {"unet"})
    if others or not state:
        raise ConfigError(
            f"adapter.continue_from goes on with an adapter of the UNet alone; {file} also adapts "
            f"{', '.join(others) or 'nothing'}. Text encoders are never trained here: fuse that "
            "adapter into the pipeline (pipe.load_lora_weights, pipe.fuse_lora) and train a "
            "fresh one."
        )
    try:
        with quiet_libraries():
            unet.load_lora_adapter(
                state, prefix="unet", network_alphas=alphas, metadata=metadata, adapter_name=NAME
            )
    except (ValueError, RuntimeError, KeyError) as error:
        raise _misfit(file, error) from error


def _misfit(path: Path, error: Exception) -> ConfigError:
    # torch lists every tensor, which are 1,400 for SDXL.
    first = [line.strip() for line in str(error).splitlines() if line.strip()][:2]
    return ConfigError(
        f"The adapter {path} does not fit this UNet: {' '.join(first)} Give the base that it was "
        "trained on."
    )


def _continue_peft(unet: Any, path: Path) -> None:
    from peft import PeftConfig, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(path))
    state = {
        key.removeprefix("base_model.model."): value
        for key, value in load_file(path / PEFT_FILE).items()
    }
    try:
        unet.add_adapter(config, adapter_name=NAME)
        outcome = set_peft_model_state_dict(unet, state, NAME)
    except (ValueError, RuntimeError, KeyError) as error:
        raise _misfit(path, error) from error
    # Base weights are "missing" from every adapter file; adapter weights must not be.
    missing = [key for key in outcome.missing_keys if ".lora_" in key]
    if missing or outcome.unexpected_keys:
        odd = [*missing, *outcome.unexpected_keys]
        raise ConfigError(
            f"The adapter in {path} does not fit this UNet: {len(odd)} tensors, such as "
            f"{odd[0]!r}, have no counterpart."
        )


def adapter_name(unet: Any) -> str | None:
    """The adapter that a UNet computes with, or None; others may lie beside it, switched off.

    Raises:
        ConfigError: it computes with several, or has several and computes with none.
    """
    if not getattr(unet, "peft_config", None):
        return None
    active = active_adapters(unet)
    if len(active) != 1:
        raise ConfigError(
            "The UNet must compute with one adapter; it has "
            f"{', '.join(unet.peft_config)}, and active are {', '.join(active) or 'none'}. Choose "
            "one with pipe.set_adapters(name), or fuse them first: pipe.fuse_lora(); "
            "pipe.unload_lora_weights()."
        )
    return active[0]


def train_only_adapter(unet: nn.Module) -> None:
    """Freeze all but the active adapter and make that one trainable, in float32."""
    own = adapter_name(unet)
    for name, parameter in unet.named_parameters():
        trains = own in name.partition(".lora_")[2].split(".")
        if trains:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(trains)


def save_adapter(unet: Any, folder: Path, name: str, base: str | None, *, loader: Any) -> None:
    """Write `pytorch_lora_weights.safetensors` (diffusers) and a kohya-style file beside it.

    Both reproduce the adapter through `pipeline.load_lora_weights`. The kohya layout has no DoRA
    that diffusers would read back, so such an adapter has the diffusers file alone.
    """
    from peft import get_peft_model_state_dict

    # A UNet has no embedding layers; asked to see for itself, peft goes to the hub.
    found = get_peft_model_state_dict(unet, adapter_name=name, save_embedding_layers=False)
    state = {key: value.detach().cpu() for key, value in found.items()}
    config = unet.peft_config[name]
    # The file's metadata carries alpha, without which a loader takes alpha = rank.
    metadata = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }
    if base is not None:
        metadata["base_model_name_or_path"] = base
    loader.save_lora_weights(folder, unet_lora_layers=state, unet_lora_adapter_metadata=metadata)
    if not config.use_dora:
        save_file(kohya_state(unet, name), folder / KOHYA_FILE, metadata={"format": "pt"})
