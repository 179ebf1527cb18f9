"""A tokenizer whose tokens are characters: lengths without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


class Characters:
    """As much of a tokenizer as reading rows takes. A conversation is the text of its messages."""

    bos_token_id = 0
    bos_token = eos_token_id = eos_token = None
    chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"

    def __call__(self, texts: Sequence[str], **options: Any) -> dict[str, list[np.ndarray]]:
        return {"input_ids": [np.frombuffer(one.encode("utf-32-le"), "<i4") for one in texts]}

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **told: Any) -> str:
        return "".join(_text(message.get("content")) for message in messages)


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content or ())
