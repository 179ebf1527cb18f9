"""Arrays as one checked file: whole, or as if it were not there."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

Arrays = Mapping[str, np.ndarray]


def dump_arrays(arrays: Arrays) -> bytes:
    """The bytes of a file."""
    check = np.array([_checksum(arrays)], dtype="i8")
    return save({name: np.ascontiguousarray(a) for name, a in {**arrays, "check": check}.items()})


def load_arrays(path: Path) -> Arrays | None:
    """What `dump_arrays` made; None if there is no file, and of a damaged one nothing is left."""
    try:
        found = load(path.read_bytes())
        if int(found.pop("check")[0]) == _checksum(found):
            return found
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, IndexError):
        pass
    path.unlink(missing_ok=True)
    return None


def _checksum(arrays: Arrays) -> int:
    found = 0
    for name in sorted(arrays):
        found = zlib.crc32(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode(), found)
        found = zlib.crc32(np.ascontiguousarray(arrays[name]).data, found)
    return found
