"""Blocks of a data set that any number of processes work off together, and may die over.

A process takes a block by a lock on one byte of a file, which the system frees when the process
ends, however it ends. A block's result is a file written whole; at the end one process joins them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignkit_diffusion.cache.arrays import Arrays, dump_arrays, load_arrays
from alignkit_diffusion.cache.writing import make_folder, write

POLL = 0.1
_JOIN, _MEND = 0, 1
_BLOCKS = 2
"""Bytes of the lock file: for joining, for mending, then one for each block."""


class Job:
    """The folder of one job.

    Args:
        folder: made if it is not there; its name says what the job is (see `keys.space_of`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._joined = self.folder / "table.safetensors"
        make_folder(self.folder / "parts")

    def result(self) -> Arrays | None:
        """What was joined; None before, and if it is damaged, which is then forgotten."""
        return load_arrays(self._joined)

    def work(self, blocks: int) -> Iterator[int]:
        """Blocks for this process to do, each while it is this process's; `done` ends one.

        Ends when all blocks are done, by whomever.
        """
        left = list(range(blocks))
        while left and not self._joined.exists():
            before = len(left)
            for block in list(left):
                if self._part(block).exists():
                    left.remove(block)
                    continue
                with self._lock(_BLOCKS + block, wait=False) as mine:
                    if not mine:
                        continue
                    # Another one may have done it, or joined all, since it was looked at.
                    if not self._part(block).exists() and not self._joined.exists():
                        yield block
                    left.remove(block)
            if len(left) == before:
                time.sleep(POLL)

    def done(self, block: int, arrays: Arrays) -> None:
        """Keep the result of a block."""
        write(self._part(block), dump_arrays(arrays))

    def part(self, block: int) -> Arrays | None:
        """The result of a block."""
        return load_arrays(self._part(block))

    @contextmanager
    def joining(self) -> Iterator[None]:
        """Inside, no other process joins."""
        with self._lock(_JOIN, wait=True):
            yield

    @contextmanager
    def mending(self) -> Iterator[None]:
        """Inside, no other process mends."""
        with self._lock(_MEND, wait=True):
            yield

    def finish(self, arrays: Arrays) -> None:
        """Keep the joined result, and drop the parts."""
        write(self._joined, dump_arrays(arrays))
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        make_folder(self.folder / "parts")

    def forget(self) -> None:
        """Drop the result: the data is not what it was."""
        self._joined.unlink(missing_ok=True)

    def _part(self, block: int) -> Path:
        return self.folder / "parts" / f"{block:07d}.safetensors"

    @contextmanager
    def _lock(self, byte: int, *, wait: bool) -> Iterator[bool]:
        """Hold one byte of the lock file; yields whether it is held."""
        handle = os.open(self.folder / "locks", os.O_RDWR | os.O_CREAT, 0o644)
        how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        try:
            try:
                fcntl.lockf(handle, how, 1, byte)
                held = True
            except (BlockingIOError, PermissionError):
                held = False
            yield held
        finally:
            os.close(handle)
