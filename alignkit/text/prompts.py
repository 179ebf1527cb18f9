"""What the rows of some data ask, for samples, and the ids of what is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignkit.columns import BadRow
from alignkit.mixtures import first_set
from alignkit.options import TextOptions
from alignkit.rows import read_rows
from alignkit.stream import is_streamed, open_stream
from alignkit.text.content import Ids
from alignkit.text.formats import left_open, prompt_of, render_prompt
from alignkit.text.layouts import Layout, recognise


def distinct_prompts(data: Any, tokenizer: Any, options: TextOptions, limit: int) -> list[Any]:
    """The first `limit` distinct prompts; of a mixture, of its first set."""
    data = first_set(data)
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
        return layout.to("prompts")(row, chat)
    except (BadRow, KeyError):
        return {}


def prompt_ids(tokenizer: Any, prompts: Sequence[Any], *, chat: bool) -> list[Ids]:
    """Token ids of prompts to be answered, each with at least one.

    Args:
        tokenizer: of the policy.
        prompts: strings or message lists.
        chat: whether a bare string is a user's turn.
    """
    ids = []
    for prompt in prompts:
        templated = chat or not isinstance(prompt, str)
        text = render_prompt(tokenizer, prompt, chat=templated)
        one = tokenizer(text, add_special_tokens=not templated)["input_ids"]
        one = one if templated else left_open(tokenizer, text, one)
        if not one:
            begin = tokenizer.bos_token_id
            one = [begin if begin is not None else tokenizer.eos_token_id]
        ids.append(np.asarray(one, dtype=np.int32))
    return ids
