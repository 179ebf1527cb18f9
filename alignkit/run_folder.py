"""The run folder: everything that a run leaves behind, in one place.

    runs/x/  config.yaml  metrics.jsonl  checkpoints/  samples/  plots/  result.json  report.html
             model/

In a run of several processes every process may open the folder; only the main one locks and writes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shutil
import subprocess
import warnings
import weakref
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from alignkit.atomic import atomic_folder, atomic_write, cannot_write, clean_leftovers, heal_folder
from alignkit.errors import CheckpointError, ConfigError
from alignkit.records import RecordFile, broken, from_json, plain, to_json
from alignkit.sample_files import Samples, read_samples, write_samples

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "RunFolder",
    "Samples",
    "atomic_folder",
    "atomic_write",
    "environment",
    "heal_folder",
    "plain",
]

_PACKAGES = ("alignkit", "torch", "transformers", "diffusers", "peft", "accelerate", "datasets")


class RunFolder:
    """A run's folder on disk; opening it creates it.

    Args:
        path: a new or empty folder, or the folder of an earlier run.

    Raises:
        ConfigError: for a file, or for a folder with somebody else's files.
        CheckpointError: for a folder that cannot be created or written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self._release: weakref.finalize | None = None
        self._metrics = RecordFile(self.path / "metrics.jsonl")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            names = os.listdir(self.path)
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigError(
                f"run_dir must be a folder; {self.path} is a file or lies below one. "
                'Give another, such as run_dir="runs/mine".'
            ) from error
        except OSError as error:
            raise self._not_writable(error.strerror or str(error)) from error
        ours = {".lock", "metrics.jsonl", "result.json"} & set(names)
        if not ours and any(not name.startswith(".") for name in names):
            some = ", ".join(sorted(names)[:3])
            raise ConfigError(
                f"run_dir must be new, empty, or the folder of an earlier run; {self.path} holds "
                f'other files ({some} ...). Give a new one: run_dir="{self.path / "run"}".'
            )
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise self._not_writable("no permission to write, or a read-only file system")
        try:
            self._lock_file.touch()
        except OSError as error:
            raise self._not_writable(error.strerror or str(error)) from error

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def _not_writable(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"A run needs a folder it can write; {self.path} is not: {reason}. "
            'Give another, such as run_dir="runs/mine", or change its permissions.'
        )

    @property
    def _lock_file(self) -> Path:
        return self.path / ".lock"

    @property
    def checkpoints(self) -> Path:
        """`checkpoints/`, created by its first checkpoint."""
        return self.path / "checkpoints"

    @property
    def samples_dir(self) -> Path:
        """`samples/`: what the policy answered at some steps."""
        return self.path / "samples"

    @property
    def plots_dir(self) -> Path:
        """`plots/`: the report's curves as pictures."""
        return self.path / "plots"

    @property
    def model_dir(self) -> Path:
        """`model/`: what `from_pretrained` loads."""
        return self.path / "model"

    @property
    def report_file(self) -> Path:
        """`report.html`."""
        return self.path / "report.html"

    def lock(self) -> None:
        """Take the folder until `unlock`, the end of this object or the end of the process.

        What a killed run left half-written is cleaned up here, because nobody else can be writing.

        Raises:
            CheckpointError: if another run holds it.
        """
        if self._release is not None and self._release.alive:
            return
        handle = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(handle)
            here = "another run of this very process" if holder == str(os.getpid()) else "a process"
            raise CheckpointError(
                f"Two runs cannot share a folder; {self.path} is in use by {here} (pid {holder}). "
                'Wait for it, stop it, or give this one another folder: run_dir="'
                f'{self.path}-2".'
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                os.close(handle)
                raise cannot_write(self._lock_file, error) from error
            warnings.warn(
                f"The file system of {self.path} has no locks, so nothing stops a second run from "
                "writing there too. Give every run its own run_dir.",
                stacklevel=2,
            )
        os.truncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        self._release = weakref.finalize(self, _unlock, handle, os.getpid())
        clean_leftovers(self.path)

    def unlock(self) -> None:
        """Give the folder back; nothing happens if it is not held."""
        if self._release is not None:
            self._release()
            self._release = None

    def reopen(self) -> None:
        """A finished run that goes on from an earlier checkpoint is finished no more."""
        (self.path / "result.json").unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what an earlier run left here, to start anew. Its model goes last."""
        for name in ("result.json", "config.yaml", "metrics.jsonl", "report.html"):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.checkpoints, self.samples_dir, self.plots_dir, self.model_dir):
            if folder.exists():
                shutil.rmtree(folder)

    def write_config(self, mapping: Mapping[str, Any]) -> None:
        """Write the resolved configuration, in the order given.

        Raises:
            ConfigError: for a value that YAML cannot hold, naming its key.
        """
        text = yaml.safe_dump(
            plain(mapping, "config"), sort_keys=False, allow_unicode=True, width=100
        )
        atomic_write(self.path / "config.yaml", text)

    def read_config(self) -> dict[str, Any] | None:
        """The resolved configuration; None if the run has not written it."""
        path = self.path / "config.yaml"
        if not path.exists():
            return None
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise broken(path, str(error)) from error
        if not isinstance(config, dict):
            raise broken(path, f"a mapping was expected, not {type(config).__name__}")
        return config

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line and flush it. NaN and infinities become null: the file is strict JSON."""
        self._metrics.append(record)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records. Only a half-written last line, which a kill leaves, is dropped."""
        return self._metrics.read()

    def cut_metrics(self, step: int) -> list[dict[str, Any]]:
        """Forget what was recorded after `step`, atomically, and return what is kept."""
        return self._metrics.cut(step)

    def write_samples(
        self,
        step: int,
        prompts: Sequence[str],
        answers: Sequence[str | Image],
        tokens: Sequence[int] = (),
        cut: Sequence[bool] = (),
    ) -> Path:
        """Keep what the policy answered at `step` (0 is before training), and return where.

        That is `samples/step-000010.jsonl` for text; for pictures it is the folder
        `samples/step-000010` with `000.png`, `001.png` ... and `prompts.json`.
        """
        return write_samples(self.samples_dir, step, prompts, answers, tokens, cut)

    def read_samples(self) -> dict[int, Samples]:
        """Step -> samples, in the order of steps."""
        return read_samples(self.samples_dir)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write `result.json`, which marks the run as finished."""
        atomic_write(self.path / "result.json", to_json(result, "result", indent=1) + "\n")

    def read_result(self) -> dict[str, Any] | None:
        """What `write_result` wrote; None if the run has not finished."""
        path = self.path / "result.json"
        if not path.exists():
            return None
        result = from_json(path.read_bytes())
        if result is None:
            raise broken(path, "it is not a JSON object")
        return result


def environment() -> dict[str, str | None]:
    """What the run ran on: versions, platform, and the git revision of the current folder.

    Nothing is imported for it. A package that is not installed is None; so is the revision outside
    a repository. A revision with uncommitted changes ends with ``-dirty``.
    """
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["python"] = platform.python_version()
    found["platform"] = platform.platform()
    found["git"] = _git_revision()
    return found


def _git_revision() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _unlock(handle: int, owner: int) -> None:
    # A forked child shares the lock of its parent and must not give it away.
    if os.getpid() == owner:
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)
