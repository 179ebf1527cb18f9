"""What the rows of some data ask, for samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignkit.columns import BadRow
from alignkit.mixtures import Mixture
from alignkit.options import TextOptions
from alignkit.rows import read_rows
from alignkit.stream import is_streamed, open_stream
from alignkit.text.formats import prompt_of
from alignkit.text.layouts import Layout, recognise


def distinct_prompts(data: Any, tokenizer: Any, options: TextOptions, limit: int) -> list[Any]:
    """The first `limit` distinct prompts; of a mixture, of its first set."""
    if isinstance(data, Mixture):
        data = data.entries()[0][1]
    streamed = is_streamed(data, options.streaming)
    rows = (open_stream if streamed else read_rows)(data, columns=options.columns)
    chat = bool(getattr(tokenizer, "chat_template", None))
    found: dict[str, Any] = {}
    layout: Layout | None = None
    for place, row in enumerate(rows):
        layout = recognise(row) if place == 0 else layout
        prompt = prompt_of(tokenizer, _converted(row, layout, chat))
        if prompt is None:
            continue
        found.setdefault(repr(prompt), prompt)
        if len(found) >= limit:
            break
    return list(found.values())


def _converted(row: Mapping[str, Any], layout: Layout | None, chat: bool) -> Mapping[str, Any]:
    if layout is None:
        return row
    try:
        return next(iter(layout.convert.values()))(row, chat)
    except (BadRow, KeyError):
        return {}
