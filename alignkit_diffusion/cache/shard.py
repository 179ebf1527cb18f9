"""One shard: entries of one shape and dtype stacked, with their keys and checksums."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

Entry = Mapping[str, Tensor]


class Damaged(Exception):
    """A shard, or an entry of one, is not what was written.

    Attributes:
        shard: its name.
    """

    def __init__(self, path: Path, reason: object) -> None:
        super().__init__(f"{path} is damaged: {reason}")
        self.shard = path.name


def checksum(entry: Entry) -> int:
    """Of an entry's bytes, in the order of its names."""
    found = 0
    for name in sorted(entry):
        raw = entry[name].contiguous().flatten().view(torch.uint8).numpy()
        found = zlib.crc32(raw.data, found)
    return found


Contents = tuple[Sequence[np.ndarray], Sequence[np.ndarray], tuple[tuple[str, ...], ...]]
"""Of each group of a shard: keys (n, 16) uint8, checksums (n,) int64, names of tensors."""


def pack(entries: Mapping[bytes, Entry]) -> tuple[dict[str, Tensor], list[Any], list[Any], Any]:
    """Entries of the same names, shapes and dtypes as groups of stacked tensors."""
    groups: dict[tuple[Any, ...], list[bytes]] = {}
    for key, entry in entries.items():
        shape = tuple((name, entry[name].shape, entry[name].dtype) for name in sorted(entry))
        groups.setdefault(shape, []).append(key)
    tensors: dict[str, Tensor] = {}
    keys, sums, names = [], [], []
    for group, (shape, members) in enumerate(groups.items()):
        names.append(tuple(name for name, *_ in shape))
        keys.append(np.frombuffer(b"".join(members), dtype=np.uint8).reshape(-1, 16))
        sums.append(np.array([checksum(entries[key]) for key in members], dtype=np.int64))
        tensors[f"{group}.key"] = torch.from_numpy(keys[-1].copy())
        tensors[f"{group}.sum"] = torch.from_numpy(sums[-1])
        for name in names[-1]:
            tensors[f"{group}.{name}"] = torch.stack([entries[key][name] for key in members])
    return tensors, keys, sums, tuple(names)


def names_of(file: Any) -> tuple[tuple[str, ...], ...]:
    """The names of the tensors of each group of an open shard."""
    told = (file.metadata() or {})["names"]
    return tuple(tuple(group.split(" ")) for group in told.split("|"))


def contents_of(path: Path) -> Contents:
    """What a shard says of itself."""
    with safe_open(path, framework="np") as file:
        names = names_of(file)
        keys = [file.get_tensor(f"{group}.key") for group in range(len(names))]
        sums = [file.get_tensor(f"{group}.sum") for group in range(len(names))]
    return keys, sums, names
