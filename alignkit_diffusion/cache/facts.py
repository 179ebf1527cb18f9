"""What a cache holds of what: the pipeline's parts, and the image files that were read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignkit_diffusion.cache.keys import hash_of_tokenizer
from alignkit_diffusion.families import Family
from alignkit_diffusion.parts import Parts
from alignkit_diffusion.rows import ImageRow


def latent_facts(parts: Parts, dtype: str, memo: Path) -> dict[str, Any]:
    """What latents depend on besides images and placements."""
    return {"vae": parts.hash_of("vae", memo), "settings": parts.settings["vae"], "dtype": dtype}


def prompt_facts(parts: Parts, family: Family, dtype: str, memo: Path) -> dict[str, Any]:
    """What embeddings depend on besides prompts."""
    pipe = parts.pipe
    names = sorted(name for name in pipe.components if name.startswith("text_encoder"))
    there = [name for name in names if getattr(pipe, name) is not None]
    tokenizers = sorted(name for name in pipe.components if name.startswith("tokenizer"))
    return {
        "family": family.name,
        "dropped": bool(pipe.config.get("force_zeros_for_empty_prompt", False)),
        "encoders": {name: parts.hash_of(name, memo) for name in there},
        "settings": {name: parts.settings[name] for name in there},
        "computed_in": {name: str(parts.dtype_of(name)) for name in there},
        "tokenizers": {
            name: hash_of_tokenizer(getattr(pipe, name))
            for name in tokenizers
            if getattr(pipe, name) is not None
        },
        "dtype": dtype,
    }


def stamps_of(rows: list[ImageRow]) -> dict[str, np.ndarray]:
    """Of image files: paths, sizes and times."""
    found = {p.stamp[0]: p.stamp[1:] for row in rows for p in row.pictures if p.stamp is not None}
    raw = "\n".join(found).encode("utf-8", "surrogatepass")
    numbers = np.array(list(found.values()), "i8").reshape(-1, 2)
    return {"stamps": np.frombuffer(raw, np.uint8), "stamp_numbers": numbers}


def join_stamps(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Those of several parts."""
    raw = b"\n".join(part["stamps"].tobytes() for part in parts if len(part["stamps"]))
    numbers = np.concatenate([part["stamp_numbers"] for part in parts])
    return {"stamps": np.frombuffer(raw, np.uint8), "stamp_numbers": numbers}


def unchanged(found: Mapping[str, np.ndarray]) -> bool:
    """Whether image files are as they were read."""
    if not len(found["stamps"]):
        return True
    paths = found["stamps"].tobytes().decode("utf-8", "surrogatepass").split("\n")
    for path, (size, when) in zip(paths, found["stamp_numbers"].tolist(), strict=True):
        try:
            now = os.stat(path)
        except OSError:
            return False
        if (now.st_size, now.st_mtime_ns) != (size, when):
            return False
    return True
