"""What a text row may look like, brought to one form: rendered strings with the prompt as their
first part.

A chat template is applied here once, by message lists; strings are taken as they are. Nothing is
cut on
characters: the boundary between prompt and completion is found later, on token ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from alignkit.errors import DataError

Messages = list[dict[str, Any]]


class BadRow(Exception):
    """A row that cannot be used, and why; becomes a DataError or a counted skip."""


@dataclass(frozen=True)
class Rendered:
    """A prompt and its answers as text.

    Attributes:
        prompt: the rendered prompt; None where it is what the answers have in common.
        full: each answer with its prompt in front.
        chat: rendered by the chat template, which places all special tokens itself.
    """

    prompt: str | None
    full: tuple[str, ...]
    chat: bool


def is_messages(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def render(tokenizer: Any, messages: Messages, *, generation_prompt: bool) -> str:
    """The conversation as text by the tokenizer's own chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "Rows with message lists need a chat template, and this tokenizer has none. Give plain "
            "strings as prompt, chosen and rejected, or set `tokenizer.chat_template` and pass "
            "(model, tokenizer)."
        )
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation_prompt
    )


def messages_of(value: Any, name: str) -> Messages:
    """A checked message list; an answer may be a bare string."""
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    if not is_messages(value) or not value:
        raise BadRow(f"{name} must be a string or a non-empty list of messages")
    for message in value:
        if not isinstance(message, Mapping) or "role" not in message:
            raise BadRow(f"{name} has a message without a role")
        content = message.get("content")
        if is_messages(content):
            kinds = {part.get("type") for part in content if isinstance(part, Mapping)}
            if kinds - {"text"}:
                raise DataError(
                    f"{name} has content of type {sorted(map(str, kinds - {'text'}))}: "
                    "vision-language policies are not supported. Give text messages only."
                )
        elif not isinstance(content, str) and not message.get("tool_calls"):
            raise BadRow(f"{name} has a message without text")
    return [dict(message) for message in value]


def render_pair(tokenizer: Any, row: Mapping[str, Any]) -> Rendered:
    """A preference row of any of the accepted shapes.

    Raises:
        BadRow: if the row cannot be used.
        DataError: if no row of this kind could be.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    prompt = row.get("prompt")
    chat = is_messages(prompt) or (prompt is None and is_messages(chosen))
    if chat:
        return _render_chat(tokenizer, prompt, chosen, rejected)
    for name, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if value is None and name == "prompt":
            continue
        if not isinstance(value, str):
            raise BadRow(f"{name} must be a string like the others; got {type(value).__name__}")
        if name != "prompt" and not value.strip():
            raise BadRow(f"{name} is empty")
    full = tuple((prompt or "") + answer for answer in (chosen, rejected))
    return Rendered(prompt, full, chat=False)


def _render_chat(tokenizer: Any, prompt: Any, chosen: Any, rejected: Any) -> Rendered:
    answers = [messages_of(chosen, "chosen"), messages_of(rejected, "rejected")]
    if prompt is None:
        shared = _shared_turns(*answers)
        opening, answers = answers[0][:shared], [answer[shared:] for answer in answers]
    else:
        opening = messages_of(prompt, "prompt")
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not any(str(m.get("content") or "").strip() or m.get("tool_calls") for m in answer):
            raise BadRow(f"{name} is empty")
    if not opening:
        raise BadRow("chosen and rejected have no first message in common, so there is no prompt")
    if opening[-1]["role"] == "assistant":
        raise BadRow("the prompt ends with an assistant message; an answer must follow a user's")
    return Rendered(
        render(tokenizer, opening, generation_prompt=True),
        tuple(render(tokenizer, opening + answer, generation_prompt=False) for answer in answers),
        chat=True,
    )


def _shared_turns(a: Messages, b: Messages) -> int:
    """How many first messages two conversations share, leaving each at least its last one."""
    limit = min(len(a), len(b)) - 1
    shared = next((i for i in range(limit) if a[i] != b[i]), limit)
    while shared > 0 and a[shared - 1]["role"] == "assistant":
        shared -= 1
    return shared


def render_prompt(tokenizer: Any, prompt: Any, *, chat: bool) -> str:
    """A prompt to be answered; `chat` wraps a bare string as a user's turn."""
    if isinstance(prompt, str) and not chat:
        return prompt
    messages = (
        [{"role": "user", "content": prompt}]
        if isinstance(prompt, str)
        else messages_of(prompt, "prompt")
    )
    return render(tokenizer, messages, generation_prompt=True)


def single_bos(tokenizer: Any, ids: Any) -> Any:
    """Ids without the second of two leading bos: one was written out and one added."""
    doubled = len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id
    return ids[1:] if doubled else ids


def left_open(tokenizer: Any, text: str, ids: Any) -> Any:
    """Ids of a plain prompt, without the eos by which some tokenizers close every text."""
    ids = single_bos(tokenizer, ids)
    closed = len(ids) > 0 and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if closed and not text.endswith(tokenizer.eos_token) else ids


def prompt_text(prompt: Any) -> str:
    """A prompt as a person reads it: the last user turn of a conversation, or the string."""
    if isinstance(prompt, str):
        return prompt
    turns = [str(m.get("content", "")) for m in prompt if m.get("role") == "user"]
    return turns[-1] if turns else str(prompt[-1].get("content", ""))
