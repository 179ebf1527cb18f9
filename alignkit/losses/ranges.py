"""Ranges of the losses' own options."""

from __future__ import annotations

from alignkit.errors import ConfigError


def within(interval: str, by: str, **options: float) -> None:
    """Raise `ConfigError` unless every option is in an interval such as "[0, 0.5)".

    NaN is in none.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    for name, value in options.items():
        above = value > low or (interval[0] == "[" and value == low)
        below = value < high or (interval[-1] == "]" and value == high)
        if not (above and below):
            raise ConfigError(f"{name} of {by!r} must be in {interval}; got {value}.")
