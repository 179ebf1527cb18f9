"""What can go wrong through no fault of ours.

Every message has three parts: the rule, what was given, and the fix to type. Each class is also the
standard exception that it refines, so that code which knows nothing of alignkit can still catch it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AlignkitError(Exception):
    """Base of all errors that a user of alignkit can cause."""


class ConfigError(AlignkitError, ValueError):
    """An option is unknown, impossible, or impossible together with another."""


class DataError(AlignkitError, ValueError):
    """A row, a file or an image is not what the data format says."""


class CheckpointError(AlignkitError, RuntimeError):
    """A run folder or checkpoint cannot be used as asked."""


class NonFiniteError(AlignkitError, FloatingPointError):
    """A loss or a gradient is NaN or infinite; no optimizer step was taken on it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``" Did you mean 'beta'?"`` for the closest of `known`, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def refuse_unknown(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise `ConfigError` unless `name` is one of `known`, naming the nearest and listing all."""
    known = sorted(known)
    if name not in known:
        listed = ", ".join(known)
        raise ConfigError(f"Unknown {kind} {name!r}.{nearest(name, known)} Known: {listed}.")
