"""Hashes: of what latents and embeddings depend on, and of the data that they are made for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor, nn

from alignkit.atomic import atomic_write
from alignkit.errors import CheckpointError
from alignkit.places import SUFFIXES

FORMAT = 1
"""Of everything in a cache; another number is another space."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def short_hash(*parts: bytes | str) -> bytes:
    """16 bytes of the parts, told apart from each other."""
    found = blake2b(digest_size=16)
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        found.update(len(raw).to_bytes(8, "big"))
        found.update(raw)
    return found.digest()


def space_of(facts: Mapping[str, Any]) -> str:
    """The name of the folder of everything that is computed under these facts."""
    return short_hash(json.dumps({"format": FORMAT, **facts}, sort_keys=True, default=str)).hex()


def hash_of_module(module: nn.Module) -> str:
    """Of the weights in memory."""
    return _hash_of_tensors(sorted(module.state_dict().items()))


def hash_of_files(paths: Sequence[Path], memo: Path | None = None) -> str:
    """Of the weights in safetensors files; the same as that of the module with these weights.

    Args:
        paths: the files.
        memo: a file that remembers hashes, since gigabytes take seconds to read.
    """
    key = json.dumps([[str(path.resolve()), *stamp(path)] for path in paths])
    known = {} if memo is None else _remembered(memo)
    if key not in known:
        known[key] = _hash_of_tensors(_tensors(paths))
        if memo is not None:
            with suppress(CheckpointError):  # without it, the next start only takes longer
                atomic_write(memo, json.dumps(known, indent=1))
    return known[key]


def _remembered(memo: Path) -> dict[str, str]:
    try:
        found = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _tensors(paths: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    where = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            where.update(dict.fromkeys(file.keys(), path))
    for name in sorted(where):
        with safe_open(where[name], framework="pt") as file:
            yield name, file.get_tensor(name)


def _hash_of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """By XXH3, which goes as fast as memory is read; nobody is to be kept from forging weights."""
    found = xxhash.xxh3_128()
    for name, tensor in tensors:
        raw = tensor.detach().cpu().contiguous().flatten()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        if raw.numel():
            found.update(raw.view(torch.uint8).numpy().data)
    return found.hexdigest()


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's settings without what only tells of its origin."""
    origin = ("dtype", "torch_dtype", "transformers_version", "architectures")
    return {k: v for k, v in dict(config).items() if not k.startswith("_") and k not in origin}


def hash_of_tokenizer(tokenizer: Any) -> str:
    """Of how it cuts texts into numbers."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    told: Any = (
        sorted(tokenizer.get_vocab().items()) if inner is None else json.loads(inner.to_str())
    )
    if inner is not None:
        # What the last call asked for stays in them.
        told = {name: told[name] for name in told if name not in ("truncation", "padding")}
    whole = json.dumps(told, sort_keys=True)
    return short_hash(whole, str(tokenizer.model_max_length), str(tokenizer.pad_token)).hex()


def identity_of(data: Any, rows: Any | None = None) -> list[Any] | None:
    """What tells a data set from others and from its own later states, without reading it all.

    Of files their names, sizes and times, wherever they lie; of a `datasets.Dataset` its
    fingerprint; of rows in memory their contents. None where there is no telling (a stream).
    """
    if isinstance(data, str | Path) and Path(data).expanduser().exists():
        path = Path(data).expanduser()
        files = [path] if path.is_file() else sorted(path.iterdir())
        kept = [f for f in files if f.suffix.lower() in (*SUFFIXES, ".arrow")]
        return ["files", *(stamp(file) for file in kept)]
    if (fingerprint := getattr(data, "_fingerprint", None)) is not None:
        return ["dataset", str(fingerprint)]
    if isinstance(data, Sequence) and not isinstance(data, str | bytes):
        parts = [_content(row) for row in data]
        return None if None in parts else ["rows", short_hash(*(p or b"" for p in parts)).hex()]
    return None


def stamp(path: Path) -> list[Any]:
    """Name, bytes and time of a file."""
    found = path.stat()
    return [path.name, found.st_size, found.st_mtime_ns]


def _content(value: Any) -> bytes | None:
    """Of what a row in memory holds; None where it cannot be told."""
    if value is None or isinstance(value, str | int | float | bool | Path):
        return repr(value).encode("utf-8", "surrogatepass")
    if isinstance(value, bytes | bytearray | memoryview):
        return short_hash(bytes(value))
    if isinstance(value, Mapping):
        flat: list[Any] = [item for pair in value.items() for item in pair]
        return _content(flat)
    if isinstance(value, Sequence):
        parts = [_content(one) for one in value]
        return None if None in parts else short_hash(*(part or b"" for part in parts))
    if hasattr(value, "tobytes") and hasattr(value, "mode"):
        return short_hash(str(value.mode), str(value.size), value.tobytes())
    return None
