"""Writing into a cache: whole or not at all, and what is said when the system refuses."""

from __future__ import annotations

from pathlib import Path

from alignkit.atomic import atomic_write
from alignkit.errors import CheckpointError, DataError


def write(path: Path, raw: bytes | str) -> None:
    """Write a file of the cache.

    Raises:
        DataError: the system refuses (disk full, no permission).
    """
    try:
        atomic_write(path, raw)
    except CheckpointError as error:
        cause = error.__cause__
        raise _refused(path, cause if isinstance(cause, OSError) else error) from error


def make_folder(path: Path) -> None:
    """Make a folder of the cache, if it is not there.

    Raises:
        DataError: the system refuses.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: Exception) -> DataError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return DataError(
        f"The cache could not write {path}: {reason}. What it holds is whole. Free some space, or "
        "give another folder (data_options.cache), and start the same command again: it goes on "
        "where it stopped."
    )
