"""Telling paths from hub names, and refusing paths that lead nowhere before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".tar")
"""The file formats of rows; in a folder, the earlier one wins."""


def is_missing(place: str | Path) -> bool:
    """Whether `place` was meant as a path and is not there.

    A hub name is "name" or "owner/name"; everything else was meant as a path.
    """
    path = Path(place).expanduser()
    if path.exists():
        return False
    looks_like_path = path.suffix.lower() in SUFFIXES or path.is_absolute()
    return looks_like_path or str(place).startswith(".") or str(place).count("/") > 1


def cache_folder(what: str, given: str | Path | None = None) -> Path:
    """Where things of the kind `what` are kept between runs: `given`, else below the folder that
    the environment names in ALIGNKIT_CACHE, else in the user's own cache folder.
    """
    if given is not None:
        return Path(given).expanduser()
    named = os.environ.get("ALIGNKIT_CACHE")
    if named:
        return Path(named).expanduser() / what
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "alignkit" / what
