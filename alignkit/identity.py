"""What a language model computes with, as plain data: equal identities give equal likelihoods.

The weights count by their bytes, wherever they came from; names, paths and adapters that are off do
not. So the base under a LoRA and the same model fully trained are one reference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from alignkit.adapters import adapter_layers, adapter_tensors
from alignkit.atomic import atomic_write

_NOT_IN_CONFIG = (
    "_name_or_path",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""Keys of a model's config that change no likelihood: the weights have their dtype themselves."""

_NOT_IN_ADAPTER = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "lora_dropout",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
)
"""Keys of an adapter's config that change no likelihood."""

CHUNK = 1 << 24


def identity(
    model: Any, *, autocast: torch.dtype | None, adapters: Sequence[str] = ()
) -> dict[str, Any]:
    """What the likelihoods of `model` depend on, besides the answers.

    Args:
        model: a transformers model or a PeftModel.
        autocast: the dtype that it computes in, None for the weights' own.
        adapters: those that are on.
    """
    base, parts = adapter_tensors(model)
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = whole.config.to_dict()
    found = {
        "class": type(whole).__name__,
        "config": _digest_of(_without(config, _NOT_IN_CONFIG)),
        "weights": weights_digest(base),
        "arithmetic": arithmetic(autocast),
    }
    on = [_adapter(model, name, parts[name]) for name in adapters]
    return found | ({"adapters": on} if on else {})


def _adapter(model: Any, name: str, tensors: Mapping[str, Tensor]) -> list[str]:
    config = model.peft_config[name].to_dict()
    scaling = sorted(
        float(layer.scaling[name])
        for layer in adapter_layers(model)
        if name in getattr(layer, "scaling", {})
    )
    about = [_without(config, _NOT_IN_ADAPTER), scaling]
    return [weights_digest(tensors), _digest_of(about)]


def _without(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in names}


def arithmetic(autocast: torch.dtype | None) -> str:
    """How products are computed, as far as it changes more than the last bits."""
    dtype = "as the weights" if autocast is None else str(autocast).removeprefix("torch.")
    return f"{dtype}, float32 products {torch.get_float32_matmul_precision()}"


def _digest_of(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=lambda other: sorted(map(str, other)))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@torch.no_grad()
def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, dtypes, shapes and all bytes, as fast as memory is read.

    XXH3's 128 bits tell apart what chance brings, and need not withstand anybody's design: who can
    choose a model's weights can choose its numbers.
    """
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for piece in _pieces(tensor):
            digest.update(piece.cpu().numpy().data)
    return digest.hexdigest()


def _pieces(tensor: Tensor) -> Iterable[Tensor]:
    """The bytes in pieces, so that a tensor on a device needs no second whole copy here."""
    flat = tensor.contiguous().view(-1)
    return flat.view(torch.uint8).split(CHUNK) if flat.numel() else ()


# --- what files hold ---------------------------------------------------------------------------


def remembered(root: Path, model: Any, how: str) -> tuple[Path | None, dict[str, Any] | None]:
    """Where the identity of a folder's model is kept, and that identity if the files are unchanged.

    So a reference of which all numbers are cached needs not even be loaded.

    Args:
        root: the cache's folder.
        model: a folder, a hub name with its files in hub's cache, or anything else (nothing kept).
        how: what else decides what is loaded, such as the dtype.
    """
    folder = _local(model)
    if folder is None:
        return None, None
    files = [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(folder.iterdir())
        if file.suffix in (".json", ".safetensors")
    ]
    path = root / "models" / f"{_digest_of([str(folder.resolve()), files, how])}.json"
    try:
        return path, json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return path, None


def remember(path: Path | None, found: Mapping[str, Any]) -> None:
    if path is not None:
        atomic_write(path, json.dumps(found, indent=2, sort_keys=True) + "\n")


def _local(model: Any) -> Path | None:
    if not isinstance(model, (str, Path)):
        return None
    if Path(model).is_dir():
        # An adapter's folder does not hold its base.
        return None if (Path(model) / "adapter_config.json").exists() else Path(model)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(model), "config.json")
    return Path(found).parent if isinstance(found, str) else None
