"""What an option's value may be: each check names the option, the rule and what was given."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from alignkit.errors import ConfigError


def positive(owner: str, **values: float | int | None) -> None:
    for name, value in values.items():
        if value is not None and not (is_number(value) and value > 0):
            raise ConfigError(f"{owner}.{name} must be a number above 0; got {value!r}.")


def finite(owner: str, **values: float | int | None) -> None:
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"{owner}.{name} must be finite; got {value!r}.")


def not_negative(owner: str, **values: float | int | None) -> None:
    for name, value in values.items():
        if value is not None and not (is_number(value) and value >= 0):
            raise ConfigError(f"{owner}.{name} must be a number, at least 0; got {value!r}.")


def share(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not (is_number(value) and 0 <= value <= 1):
            raise ConfigError(f"{owner}.{name} must be between 0 and 1; got {value!r}.")


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def list_of_names(owner: str, value: Any) -> tuple[str, ...]:
    """A tuple of strings; a bare string would fall apart into letters."""
    if isinstance(value, str):
        raise ConfigError(f"{owner} is a list of strings; got {value!r}. Write ({value!r},).")
    return tuple(value)
