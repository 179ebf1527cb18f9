"""Numbers of a reference on disk: what was asked -> a number, shared by all runs.

    FOLDER/<identity of the reference>/
        about.json              what the identity stands for, for people
        <digest>.safetensors    a shard: keys (n, 16) uint8 and values (n,) float32

A shard carries its own keys, so the listing of the folder is the index: writers need no lock, and
one that is killed leaves whole shards only. A shard is named after what it holds, and read again
only if that still is what it is named after.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignkit.atomic import atomic_write

log = logging.getLogger("alignkit")

KEY_BYTES = 16
SUFFIX = ".safetensors"
MANY = 64
"""Shards of a folder that are worth being made one."""


class Table:
    """Keys of 16 bytes -> float32: sorted arrays for the many, a dict for those that came since."""

    def __init__(self) -> None:
        self._words = np.empty((0, 2), dtype=np.uint64)
        self._values = np.empty(0, dtype=np.float32)
        self._new: dict[bytes, float] = {}

    def __len__(self) -> int:
        return len(self._values) + len(self._new)

    def get(self, key: bytes) -> float | None:
        found = self._new.get(key)
        if found is not None:
            return found
        word = np.frombuffer(key, dtype=np.uint64)
        place = int(np.searchsorted(self._words[:, 0], word[0]))
        while place < len(self._words) and self._words[place, 0] == word[0]:
            if self._words[place, 1] == word[1]:
                return float(self._values[place])
            place += 1
        return None

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Take in (n, 16) uint8 keys; the value of one that is there already stays."""
        if len(keys) > len(self._words) // 8:
            since = as_keys(list(self._new))
            words = np.concatenate([since, keys]).view(np.uint64).reshape(-1, 2)
            self._words = np.concatenate([self._words, words])
            held = np.array(list(self._new.values()), dtype=np.float32)
            self._values = np.concatenate([self._values, held, values.astype(np.float32)])
            self._new = {}
            # Stable and by both words: of equal keys the earlier one comes first.
            order = np.lexsort((self._words[:, 1], self._words[:, 0]))
            self._words, self._values = self._words[order], self._values[order]
            first = np.ones(len(order), dtype=bool)
            first[1:] = (self._words[1:] != self._words[:-1]).any(1)
            self._words, self._values = self._words[first], self._values[first]
            return
        for key, value in zip(keys, values.tolist(), strict=True):
            if self.get(raw := key.tobytes()) is None:
                self._new[raw] = value


class ReferenceStore:
    """The shards of one reference.

    Args:
        root: the cache's folder.
        identity: what the numbers depend on besides the answers; see `alignkit.identity`.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any]) -> None:
        text = json.dumps(identity, sort_keys=True)
        self.identity = identity
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:32]

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """All keys (n, 16) and values (n,). Many small shards become one."""
        while True:
            names = sorted(self.folder.glob(f"[0-9a-f]*{SUFFIX}"))
            try:
                whole = [shard for name in names if (shard := _read(name)) is not None]
            except FileNotFoundError:  # another process made one of many just now
                continue
            keys = [np.empty((0, KEY_BYTES), dtype=np.uint8), *(keys for keys, _ in whole)]
            values = [np.empty(0, dtype=np.float32), *(values for _, values in whole)]
            found = np.concatenate(keys), np.concatenate(values)
            if len(names) > MANY:
                self._unite(names, *found)
            return found

    def _unite(self, names: Iterable[Path], keys: np.ndarray, values: np.ndarray) -> None:
        united = self.write(keys, values)
        for name in names:
            if name != united:
                name.unlink(missing_ok=True)

    def write(self, keys: np.ndarray, values: np.ndarray) -> Path:
        """Add a shard; it is on disk when this returns.

        Raises:
            CheckpointError: if the disk refuses.
        """
        from safetensors.numpy import save

        about = self.folder / "about.json"
        if not about.exists():
            atomic_write(about, json.dumps(self.identity, indent=2, sort_keys=True) + "\n")
        arrays = {"keys": np.ascontiguousarray(keys), "values": values.astype(np.float32)}
        path = self.folder / f"{_digest(**arrays)}{SUFFIX}"
        atomic_write(path, save(arrays))
        return path


def _read(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(path.read_bytes())
        if _digest(**arrays) == path.stem:
            return arrays["keys"], arrays["values"]
    except (SafetensorError, ValueError, KeyError, TypeError):
        pass
    log.warning("%s is damaged; it is passed over, and its numbers are computed again.", path)
    return None


def _digest(keys: np.ndarray, values: np.ndarray) -> str:
    return hashlib.sha256(keys.tobytes() + values.tobytes()).hexdigest()[:32]


def as_keys(keys: Sequence[bytes]) -> np.ndarray:
    """(n, 16) uint8."""
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)
