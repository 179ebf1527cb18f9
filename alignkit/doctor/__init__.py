"""Looks at what a run is to be made of, before it costs anything, and says what it found."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from alignkit.data_report import DataReport
from alignkit.doctor.looks import modality_of_rows
from alignkit.errors import ConfigError, refuse_unknown
from alignkit.options import ImageOptions, TextOptions
from alignkit.rows import read_rows
from alignkit.schema import build
from alignkit.stream import is_streamed, open_stream

EXAMINERS: Mapping[str, tuple[str, type[TextOptions] | type[ImageOptions]]] = {
    "text": ("alignkit.text.examination", TextOptions),
    "image": ("alignkit_diffusion.examination", ImageOptions),
}
"""Modality -> the module whose `examine` looks at such rows, and the options that they are read by.

    examine(data, options, *, kind, tokenizer) -> DataReport

`kind` is "auto" or one that the wing reads rows of; `tokenizer` a folder or hub name, or None.
"""


def examine(
    data: Any,
    *,
    modality: str = "auto",
    kind: str = "auto",
    tokenizer: str | None = None,
    data_options: Mapping[str, Any] | None = None,
) -> DataReport:
    """What is in `data`, what is wrong with it, and what a run would leave out.

    Args:
        data: as `align` takes it.
        modality: "text" or "image"; "auto" goes by the columns.
        kind: "pairs", "groups", "unpaired", "supervised" or (text) "prompts"; "auto" goes by the
            columns.
        tokenizer: a folder or hub name whose tokenizer counts lengths; without one they are
            counted in characters. Text only.
        data_options: those of the run that will use the data.

    Raises:
        DataError: for data that cannot be read at all; bad rows are findings.
        ConfigError: for options that do not exist.
    """
    given = dict(data_options or {})
    if modality == "auto":
        opened = open_stream if is_streamed(data, "auto") else read_rows
        rows = opened(data, columns=given.get("columns") or {})
        modality = modality_of_rows(next(iter(rows)))
    refuse_unknown("modality", modality, EXAMINERS)
    place, options = EXAMINERS[modality]
    if tokenizer is not None and modality != "text":
        raise ConfigError("A tokenizer counts text; these rows are images. Leave it out.")
    return import_module(place).examine(
        data, build(options, given, "data_options"), kind=kind, tokenizer=tokenizer
    )
