"""Where the entries of a store are: sorted arrays, because a million objects would take gigabytes.

Entries that came since the last sorting are in a dict until they are many.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alignkit_diffusion.cache.arrays import dump_arrays, load_arrays

RECENT = 50_000
"""Entries that are kept unsorted: sorting two million takes a third of a second."""

_ARRAYS = ("high", "low", "shard", "group", "row", "sum")


class Place(NamedTuple):
    """Where an entry is: which row of which group of stacked tensors of which shard."""

    shard: str
    group: int
    row: int
    checksum: int


class Index:
    """Key -> place.

    Attributes:
        shards: that the index knows, with their bytes.
    """

    def __init__(self) -> None:
        self.shards: dict[str, int] = {}
        self._names: list[str] = []
        self._clear()
        self._recent: dict[bytes, Place] = {}

    def _clear(self) -> None:
        self._arrays = {
            name: np.zeros(0, dtype)
            for name, dtype in zip(_ARRAYS, ("u8", "u8", "i4", "i4", "i4", "i8"), strict=True)
        }

    def __len__(self) -> int:
        return len(self._arrays["high"]) + len(self._recent)

    def find(self, key: bytes) -> Place | None:
        """Where an entry is, or None."""
        if key in self._recent:
            return self._recent[key]
        high, low = (int.from_bytes(half, "big") for half in (key[:8], key[8:]))
        arrays = self._arrays
        at = int(np.searchsorted(arrays["high"], np.uint64(high)))
        while at < len(arrays["high"]) and int(arrays["high"][at]) == high:
            if int(arrays["low"][at]) == low:
                shard = self._names[arrays["shard"][at]]
                row, group = int(arrays["row"][at]), int(arrays["group"][at])
                return Place(shard, group, row, int(arrays["sum"][at]))
            at += 1
        return None

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """(N,) bool for keys (N, 16) uint8."""
        self._sort()
        high, low = _halves(keys)
        at = np.searchsorted(self._arrays["high"], high)
        found = np.zeros(len(keys), bool)
        inside = at < len(self._arrays["high"])
        # Two keys with one first half are a rarity; the walk is for them.
        while inside.any():
            same = inside & (self._arrays["high"][np.where(inside, at, 0)] == high)
            found |= same & (self._arrays["low"][np.where(inside, at, 0)] == low)
            at = at + 1
            inside = same & ~found & (at < len(self._arrays["high"]))
        return found

    def add_shard(
        self,
        name: str,
        size: int,
        keys: Sequence[np.ndarray],
        sums: Sequence[np.ndarray],
        names: Sequence[Sequence[str]],
    ) -> None:
        """Learn of a shard by its contents (see `store.Contents`)."""
        self.shards[name] = size
        for group, (group_keys, group_sums) in enumerate(zip(keys, sums, strict=True)):
            raw = group_keys.tobytes()
            for row, checksum in enumerate(group_sums.tolist()):
                place = Place(name, group, row, checksum)
                self._recent[raw[16 * row : 16 * row + 16]] = place
        if len(self._recent) > RECENT:
            self._sort()

    def drop(self, shard: str) -> None:
        """Forget a shard."""
        self.keep_only({name: size for name, size in self.shards.items() if name != shard})

    def keep_only(self, sizes: Mapping[str, int]) -> None:
        """Forget the shards that are not there, or not of that size."""
        gone = {name for name, size in self.shards.items() if sizes.get(name) != size}
        if not gone:
            return
        self._recent = {k: place for k, place in self._recent.items() if place.shard not in gone}
        left = np.array([name not in gone for name in self._names], bool)
        if len(left):
            mask = left[self._arrays["shard"]]
            self._arrays = {name: array[mask] for name, array in self._arrays.items()}
        self.shards = {name: size for name, size in self.shards.items() if name not in gone}

    def count(self, shard: str) -> int:
        """Entries of a shard."""
        recent = sum(place.shard == shard for place in self._recent.values())
        if shard not in self._names:
            return recent
        return recent + int((self._arrays["shard"] == self._names.index(shard)).sum())

    def dump(self) -> bytes:
        """As a file."""
        self._sort()
        told = json.dumps({"names": self._names, "sizes": self.shards}).encode()
        return dump_arrays({**self._arrays, "told": np.frombuffer(told, np.uint8)})

    def load(self, path: Path, sizes: Mapping[str, int]) -> None:
        """Read a file of `dump`, as far as the shards are there; nothing if it is not whole."""
        found = load_arrays(path)
        if found is None:
            return
        told = json.loads(found["told"].tobytes())
        self._arrays = {name: found[name] for name in _ARRAYS}
        self._names, self.shards = told["names"], told["sizes"]
        self.keep_only(sizes)

    def _sort(self) -> None:
        if not self._recent:
            return
        places = list(self._recent.values())
        number = {name: at for at, name in enumerate(self._names)}
        for place in places:
            if place.shard not in number:
                number[place.shard] = len(self._names)
                self._names.append(place.shard)
        keys = np.frombuffer(b"".join(self._recent), dtype=np.uint8).reshape(-1, 16)
        high, low = _halves(keys)
        fresh = {
            "high": high,
            "low": low,
            "shard": np.array([number[place.shard] for place in places], "i4"),
            "group": np.array([place.group for place in places], "i4"),
            "row": np.array([place.row for place in places], "i4"),
            "sum": np.array([place.checksum for place in places], "i8"),
        }
        both = {name: np.concatenate([self._arrays[name], fresh[name]]) for name in _ARRAYS}
        # Of two processes that encoded the same image at once, the first in the order stays.
        order = np.lexsort((both["low"], both["high"]))
        high, low = both["high"][order], both["low"][order]
        first = np.ones(len(order), bool)
        first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        self._arrays = {name: array[order[first]] for name, array in both.items()}
        self._recent = {}


def _halves(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    words = np.ascontiguousarray(keys).view(">u8").reshape(-1, 2).astype("u8")
    return np.ascontiguousarray(words[:, 0]), np.ascontiguousarray(words[:, 1])
