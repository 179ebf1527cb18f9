"""Tensors by content key, in checked safetensors shards of bounded size, with an index over them.

A shard is written once, under its final name when it is whole, and holds its own keys and
checksums; so any process may be killed at any moment, any number of them may write, and the index
is a convenience that is made again from the shards where it is missing, cut off or stale.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from alignkit_diffusion.cache.index import Index, Place
from alignkit_diffusion.cache.shard import Damaged, Entry, checksum, contents_of, names_of, pack
from alignkit_diffusion.cache.writing import make_folder, write

log = logging.getLogger("alignkit")

SHARD_BYTES = 128 * 2**20
"""A shard is written when its tensors reach this; so it is larger by one entry at most."""

SHARD_SECONDS = 30.0
"""And at the latest after so long, which is what a kill can cost."""

OPEN_SHARDS = 64
STALE_SECONDS = 3600.0
SUFFIX = ".safetensors"


class _Open(NamedTuple):
    file: Any
    names: tuple[tuple[str, ...], ...]


class Store:
    """Entries by 16-byte key in one folder.

    Args:
        folder: made if it is not there. One kind of entries of one space (see `keys`) lives here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._make_folder()
        self._index = Index()
        self._opened: OrderedDict[str, _Open] = OrderedDict()
        self._waiting: dict[bytes, Entry] = {}
        self._bytes = 0
        self._since = time.monotonic()
        self._index.load(self.folder / "index.arrays", self._sizes())
        self.refresh()

    def __len__(self) -> int:
        """Entries, those that are still to be written among them."""
        return len(self._index) + len(self._waiting)

    def __contains__(self, key: bytes) -> bool:
        return key in self._waiting or self._index.find(key) is not None

    @property
    def shards(self) -> dict[str, int]:
        """Shards that are known, with their bytes."""
        return dict(self._index.shards)

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """(N,) bool: which of the keys, (N, 16) uint8, are in no shard."""
        return ~self._index.contains(keys)

    def refresh(self) -> None:
        """Learn of shards that other processes have written, and of those that went."""
        sizes = self._sizes()
        self._index.keep_only(sizes)
        for name in sizes.keys() - self._index.shards.keys():
            try:
                self._index.add_shard(name, sizes[name], *contents_of(self.folder / name))
            except FileNotFoundError:
                continue
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                self._set_aside(name, error)

    def get(self, key: bytes) -> Entry | None:
        """The entry, or None if there is none.

        Raises:
            Damaged: it is not what was written; `mend` its shard.
        """
        if key in self._waiting:
            return self._waiting[key]
        place = self._index.find(key)
        if place is None:
            return None
        if not (self.folder / place.shard).exists():
            self.refresh()
            place = self._index.find(key)
        return None if place is None else self._read(place)

    def put(self, key: bytes, entry: Entry) -> None:
        """Keep an entry; it is on disk after the next `flush`, which happens by itself."""
        if key in self:
            return
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting[key] = {name: tensor.contiguous() for name, tensor in entry.items()}
        self._bytes += sum(tensor.nbytes for tensor in entry.values())
        late = time.monotonic() - self._since > SHARD_SECONDS
        if self._bytes >= SHARD_BYTES or late:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting as a shard.

        Raises:
            DataError: the system refuses (disk full, no permission).
        """
        if not self._waiting:
            return
        name = secrets.token_hex(12) + SUFFIX
        tensors, keys, sums, names = pack(self._waiting)
        raw = save(tensors, metadata={"names": "|".join(" ".join(group) for group in names)})
        write(self.folder / name, raw)
        self._index.add_shard(name, len(raw), keys, sums, names)
        self._waiting, self._bytes = {}, 0

    def save_index(self) -> None:
        """Write the index of all shards, so that the next start reads one file."""
        self.flush()
        self.refresh()
        write(self.folder / "index.arrays", self._index.dump())

    def mend(self, shard: str) -> int:
        """Keep what is whole of a shard in a new one, and give up the rest.

        Returns:
            how many entries were given up.
        """
        path = self.folder / shard
        self._opened.pop(shard, None)
        try:
            keys, sums, _ = contents_of(path)
            total = sum(len(group) for group in keys)
        except (SafetensorError, OSError, KeyError, ValueError):
            total = self._index.count(shard)
            keys, sums = [], []
        kept = 0
        self._index.drop(shard)
        for group, group_keys in enumerate(keys):
            for row in range(len(group_keys)):
                place = Place(shard, group, row, int(sums[group][row]))
                try:
                    entry = self._read(place)
                except Damaged:
                    continue
                self.put(group_keys[row].tobytes(), {n: t.clone() for n, t in entry.items()})
                kept += 1
        self.flush()
        self._opened.pop(shard, None)
        path.unlink(missing_ok=True)
        return total - kept

    def verify(self) -> int:
        """Read everything, mend what is damaged, and say how many entries were given up."""
        return sum(self.mend(shard) for shard in sorted(self._index.shards) if self._bad(shard))

    def _bad(self, shard: str) -> bool:
        try:
            keys, sums, _ = contents_of(self.folder / shard)
            for group, group_keys in enumerate(keys):
                for row, key in enumerate(group_keys):
                    if self._index.find(key.tobytes()) is None:
                        return True
                    self._read(Place(shard, group, row, int(sums[group][row])))
        except (Damaged, SafetensorError, OSError, KeyError, ValueError):
            return True
        return False

    def _read(self, place: Place) -> dict[str, Tensor]:
        try:
            file, names = self._open(place.shard)
            found = {
                name: file.get_slice(f"{place.group}.{name}")[place.row : place.row + 1][0]
                for name in names[place.group]
            }
        except (SafetensorError, OSError, KeyError, IndexError, ValueError) as error:
            raise Damaged(self.folder / place.shard, error) from error
        if checksum(found) != place.checksum:
            raise Damaged(self.folder / place.shard, "an entry's checksum is wrong")
        return found

    def _open(self, shard: str) -> _Open:
        if shard not in self._opened:
            file = safe_open(self.folder / shard, framework="pt")
            self._opened[shard] = _Open(file, names_of(file))
            while len(self._opened) > OPEN_SHARDS:
                self._opened.popitem(last=False)
        self._opened.move_to_end(shard)
        return self._opened[shard]

    def _sizes(self) -> dict[str, int]:
        with os.scandir(self.folder) as found:
            return {
                one.name: one.stat().st_size
                for one in found
                if one.name.endswith(SUFFIX) and not one.name.startswith(".")
            }

    def _set_aside(self, shard: str, error: Exception) -> None:
        log.warning(
            "%s is damaged (%s) and set aside; what it held is computed again.",
            self.folder / shard,
            error,
        )
        path = self.folder / shard
        if path.exists():
            os.replace(path, path.with_suffix(".damaged"))

    def _make_folder(self) -> None:
        make_folder(self.folder)
        # What a killed process had begun to write; a living one takes seconds, not an hour.
        for path in self.folder.glob(".alignkit-tmp-*"):
            try:
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
            except FileNotFoundError:
                continue
