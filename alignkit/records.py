"""Records on disk: plain values, strict JSON, and the metrics file that outlives a kill.

Strict JSON has neither NaN nor infinity; both are written as null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from alignkit.atomic import atomic_write, cannot_write
from alignkit.errors import CheckpointError, ConfigError


def plain(value: Any, where: str = "value") -> Any:
    """`value` in the types that YAML and JSON share; mappings keep their order.

    Raises:
        ConfigError: for anything else, saying where it stands.
    """
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # numpy and torch scalars
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): plain(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry, f"{where}[{index}]") for index, entry in enumerate(value)]
    raise ConfigError(
        f"{where} must be a number, a string, a list or a mapping to be written down; got "
        f"{type(value).__name__}. Give its name or path instead."
    )


def to_json(value: Any, where: str, indent: int | None = None) -> str:
    """`value` as strict JSON."""
    return json.dumps(
        _finite(plain(value, where)), ensure_ascii=False, allow_nan=False, indent=indent
    )


def from_json(line: bytes) -> dict[str, Any] | None:
    """The JSON object in `line`, or None if there is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def differences(
    old: Any, new: Any, ignored: Collection[str] = (), path: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """The leaves at which two nested mappings differ: dotted path, old value, new value."""
    if path in ignored:
        return
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        if old != new:
            yield path, old, new
        return
    for key in [*old, *(key for key in new if key not in old)]:
        inner = f"{path}.{key}" if path else str(key)
        yield from differences(old.get(key), new.get(key), ignored, inner)


def keep_or_refuse(
    path: Path,
    facts: Mapping[str, Any],
    what: str,
    *,
    ignored: Collection[str] = (),
    write: bool = True,
) -> None:
    """Write down what a folder's contents rest on; in a folder that was begun, compare it.

    Args:
        path: the JSON file in that folder, which is made if it is not there.
        facts: plain values, or mappings of such.
        what: how errors call the contents, a plural.
        ignored: dotted paths that may change.
        write: False for processes that only compare.

    Raises:
        CheckpointError: they were begun on other facts.
    """
    told = to_json(facts, path.stem, indent=1)
    if not path.exists():
        if write:
            atomic_write(path, told + "\n")
        return
    before = from_json(path.read_bytes()) or {}
    changed = [
        f"{name}: {_shown(old)} before, {_shown(new)} now"
        for name, old, new in differences(before, json.loads(told), ignored)
    ]
    if changed:
        raise CheckpointError(
            f"The {what} in {path.parent} were begun otherwise: {'; '.join(changed)}. Ask for the "
            "same as before, or give another folder."
        )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def broken(path: Path, reason: str) -> CheckpointError:
    """The error of a file that cannot be read although it is there."""
    return CheckpointError(
        f"{path} cannot be read: {reason}. alignkit writes its files whole, so it was changed from "
        "outside. Restore or delete it, or give another run_dir."
    )


class RecordFile:
    """A JSON-lines file that grows by one flushed line at a time.

    A kill can leave half a line at its end. Reading drops that one, and so does the next append.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ends_whole = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line and flush it."""
        line = to_json(record, self.path.stem).encode("utf-8", "backslashreplace") + b"\n"
        try:
            if not self._ends_whole:
                self._mend()
            self._ends_whole = False  # until this line is out
            with open(self.path, "ab") as file:
                file.write(line)
            self._ends_whole = True
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def read(self) -> list[dict[str, Any]]:
        """All records but a half-written last one.

        Raises:
            CheckpointError: for any other line that is not a JSON object, naming it.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")
        records = []
        for number, line in enumerate(lines, start=1):
            record = from_json(line)
            if record is not None:
                records.append(record)
            elif number < len(lines):
                raise broken(self.path, f"line {number} is not a JSON object")
        return records

    def cut(self, step: int) -> list[dict[str, Any]]:
        """Forget what was recorded after `step`; what is kept is returned. All or nothing."""
        kept = [record for record in self.read() if record.get("step", 0) <= step]
        atomic_write(self.path, "".join(to_json(r, self.path.stem) + "\n" for r in kept))
        return kept

    def _mend(self) -> None:
        """Make the file end with a whole line."""
        if not self.path.exists():
            return
        raw = self.path.read_bytes()
        if not raw or raw.endswith(b"\n"):
            return
        last = raw.rfind(b"\n") + 1
        if from_json(raw[last:]) is None:
            os.truncate(self.path, last)
        else:
            with open(self.path, "ab") as file:
                file.write(b"\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list) else value
