"""Files and folders that are whole or not there, whatever moment the process is killed at.

Everything is written beside its target under a hidden temporary name, forced to disk, and renamed
onto the target. A folder cannot be renamed onto a non-empty one, so an existing folder steps aside
first; `heal_folder` brings it back if the process died between the two renames.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from alignkit.errors import CheckpointError

_TEMPORARY = ".alignkit-tmp-"
_ASIDE = ".alignkit-old-"
_FOLDERS_NOT_SYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` such that a crash leaves either the old file or the new one.

    Raises:
        CheckpointError: when the system refuses (disk full, no permission); nothing is left behind.
    """
    path = Path(path)
    # A lone surrogate, which a model can emit, becomes its \uXXXX escape: valid JSON.
    raw = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    temporary = _temporary(path)
    with _readable_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; at the end it becomes `path`, replacing what was there.

    A crash at any moment leaves the old folder or the new one, at `path` or where `heal_folder`
    finds it. On an exception the temporary folder is removed and `path` stays as it was.

    Raises:
        CheckpointError: when the system refuses to write (disk full, no permission).
    """
    path = Path(path)
    temporary = _temporary(path)
    with _readable_errors(path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            _sync_tree(temporary)
            _move_in(temporary, path)
        except BaseException:
            _remove(temporary)
            raise


def heal_folder(path: Path) -> Path:
    """Finish what a killed `atomic_folder(path)` began, and return `path`.

    The old folder comes back if the new one never arrived, and goes if it did. Call it only where
    nobody else is writing `path`; a run folder does it for all its folders when it is locked.
    """
    path = Path(path)
    aside = path.with_name(_ASIDE + path.name)
    if os.path.lexists(aside):
        if os.path.lexists(path):
            _remove(aside)
        else:
            os.replace(aside, path)
    return path


def clean_leftovers(root: Path) -> None:
    """Remove temporary files of killed processes anywhere under `root`, and heal its folders."""
    for place, folders, files in os.walk(root):
        for name in (*folders, *files):
            if name.startswith(_TEMPORARY):
                _remove(Path(place, name))
            elif name.startswith(_ASIDE):
                heal_folder(Path(place, name.removeprefix(_ASIDE)))
        folders[:] = [name for name in folders if not name.startswith((_TEMPORARY, _ASIDE))]


def _temporary(path: Path) -> Path:
    return path.with_name(f"{_TEMPORARY}{path.name}-{secrets.token_hex(4)}")


@contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error
    except SafetensorError as error:
        # safetensors tells of a refused write in its own words, which end with the system's code.
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        refused = OSError(int(code[1]), os.strerror(int(code[1])))
        raise cannot_write(path, refused) from error


def cannot_write(path: Path, error: OSError) -> CheckpointError:
    """The error of a write that the system refused: what, why, and what to do."""
    reason = error.strerror or str(error)
    advice = "Check the permissions of its folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "Free some space, or set trainer.keep_checkpoints lower"
    return CheckpointError(
        f"Could not write {path}: {reason}. Nothing that was there is damaged. {advice}, or give "
        "another run_dir, and start the same command again: it goes on from the last checkpoint."
    )


def _move_in(temporary: Path, path: Path) -> None:
    heal_folder(path)
    if not os.path.lexists(path):
        os.replace(temporary, path)
        _sync_folder(path.parent)
        return
    aside = path.with_name(_ASIDE + path.name)
    os.replace(path, aside)
    try:
        os.replace(temporary, path)
    except BaseException:
        os.replace(aside, path)
        raise
    # The new name has to be on disk before the old data goes, or a power cut could lose both.
    _sync_folder(path.parent)
    _remove(aside)


def _remove(path: Path) -> None:
    """Remove a file, link or folder; what cannot be removed now is removed by `clean_leftovers`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(root: Path) -> None:
    for place, _, files in os.walk(root):
        for name in files:
            if not os.path.islink(os.path.join(place, name)):
                _sync(Path(place, name))
        _sync_folder(Path(place))


def _sync_folder(path: Path) -> None:
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in _FOLDERS_NOT_SYNCED:  # some network file systems cannot sync folders
            raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
