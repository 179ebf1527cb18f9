"""Rows that ask: prompts for a policy to answer, however they are given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.errors import DataError
from alignkit.rows import Row, read_rows


def read_prompts(prompts: Any, columns: Mapping[str, str]) -> list[Row]:
    """Rows with a prompt, of a list of prompts or of data.

    Raises:
        DataError: a row has none.
    """
    if isinstance(prompts, Sequence) and not isinstance(prompts, (str, bytes)):
        prompts = [one if isinstance(one, Mapping) else {"prompt": one} for one in prompts]
    rows = list(read_rows(prompts, columns=columns))
    for number, row in enumerate(rows):
        if not row.get("prompt"):
            raise DataError(
                "Answers are sampled for rows with a prompt; "
                f"row {number} has {row.get('prompt')!r}. Columns found: "
                f"{', '.join(row) or 'none'}. Rename with data_options.columns."
            )
    return rows


def as_asked(prompt: Any, chat: bool) -> Any:
    """The prompt as it was put to the policy: bare strings are a user's turn in a chat."""
    return [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt


def digest_of(rows: Sequence[Row]) -> str:
    """Of what rows say; of what stands in no text, such as a picture in memory, only its type."""
    text = json.dumps(rows, ensure_ascii=False, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
