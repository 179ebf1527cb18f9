"""What the command line writes as text, as options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignkit.config import override
from alignkit.errors import ConfigError
from alignkit.options import ImageOptions, TextOptions
from alignkit.schema import build
from alignkit.trained import source_of


def strengths_of(text: str | None) -> tuple[float, ...]:
    """ "0.3,0.6" as numbers.

    Raises:
        ConfigError: there is something else among them.
    """
    try:
        return () if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"Strengths are numbers with commas between them, such as 0.3,0.6; got {text!r}."
        ) from error


def data_options_of(model: str, given: Sequence[str]) -> Any:
    """`key=value` as the options of the model's modality; None where nothing is given.

    Raises:
        ConfigError: naming the key that is unknown or of another type.
    """
    if not given:
        return None
    options = ImageOptions if source_of(model).modality == "image" else TextOptions
    return build(options, override({}, given), "data_options")
