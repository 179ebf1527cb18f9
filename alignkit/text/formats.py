"""What a text row may look like, brought to one form: rendered strings with the prompt as their
first part.

A chat template is applied here once, by message lists; strings are taken as they are. Nothing is
cut on characters: the boundary between prompt and completion is found later, on token ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeGuard

from alignkit.columns import BadRow
from alignkit.errors import DataError

Messages = list[dict[str, Any]]


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


def render(
    tokenizer: Any,
    messages: Messages,
    *,
    generation_prompt: bool,
    told: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """The conversation as text by the tokenizer's own chat template; `told` is for the template.

    Raises:
        BadRow: if the template refuses it, as some do with roles that they do not know.
        DataError: if there is no template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "Rows with message lists need a chat template, and this tokenizer has none. Give plain "
            "strings as prompt, chosen and rejected, or set `tokenizer.chat_template` and pass "
            "(model, tokenizer)."
        )
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt, **told
        )
    except Exception as error:  # templates are programs, and may fail in any way
        refusal = "the chat template refuses the conversation"
        raise BadRow(refusal, f"{refusal}: {error}") from error


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


def render_answers(
    tokenizer: Any, prompt: Any, answers: Mapping[str, Any], row: Mapping[str, Any]
) -> Rendered:
    """A prompt and its answers in any of the accepted shapes.

    Args:
        tokenizer: its chat template renders message lists.
        prompt: a string, messages, or None for what two or more answers have in common.
        answers: their name in errors -> string or messages.
        row: whose `tools` and `chat_template_kwargs` the template is told.

    Raises:
        BadRow: if the row cannot be used.
        DataError: if no row of this kind could be.
    """
    if prompt is None and len(answers) < 2:
        raise BadRow("there is no prompt")
    if is_messages(prompt) or is_messages(next(iter(answers.values()))):
        rendered = _render_chat(tokenizer, prompt, answers, told_of(row))
    else:
        rendered = _render_plain(prompt, answers)
    return encodable(rendered)


def encodable(rendered: Rendered) -> Rendered:
    """The same; raises `BadRow` for a text that no tokenizer takes."""
    for text in (rendered.prompt or "", *rendered.full):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRow("there is half a surrogate pair in the text") from error
    return rendered


def _render_plain(prompt: Any, answers: Mapping[str, Any]) -> Rendered:
    given = answers if prompt is None else {"prompt": prompt, **answers}
    for name, value in given.items():
        if not isinstance(value, str):
            kind = type(value).__name__
            raise BadRow(
                f"{name} must be a string", f"{name} must be a string like the others; got {kind}"
            )
    for name, value in answers.items():
        if not value.strip():
            raise BadRow(f"{name} is empty")
    return Rendered(prompt, tuple((prompt or "") + value for value in answers.values()), chat=False)


def _render_chat(
    tokenizer: Any, prompt: Any, given: Mapping[str, Any], told: Mapping[str, Any]
) -> Rendered:
    answers = [messages_of(value, name) for name, value in given.items()]
    opening, answers = _parted(prompt, answers)
    for name, answer in zip(given, answers, strict=True):
        if not any(str(m.get("content") or "").strip() or m.get("tool_calls") for m in answer):
            raise BadRow(f"{name} is empty")
    if not opening:
        raise BadRow(
            f"{' and '.join(given)} have no first message in common, so there is no prompt"
        )
    if opening[-1]["role"] == "assistant":
        raise BadRow("the prompt ends with an assistant message; an answer must follow a user's")
    for name, answer in zip(given, answers, strict=True):
        if answer[0]["role"] in ("user", "system"):
            role = answer[0]["role"]
            raise BadRow(f"{name} begins with a {role}'s message, which answers nothing")
    whole = [
        render(tokenizer, opening + answer, generation_prompt=False, told=told)
        for answer in answers
    ]
    begun = render(tokenizer, opening, generation_prompt=True, told=told)
    return Rendered(begun, tuple(whole), chat=True)


def _parted(prompt: Any, answers: list[Messages]) -> tuple[Messages, list[Messages]]:
    """The conversation before the answers, and the answers without it.

    Published data often repeats the prompt at the beginning of each answer's messages, beside a
    prompt column that is those messages, or only the last user's text.
    """
    if isinstance(prompt, str):
        opening = [{"role": "user", "content": prompt}]
    else:
        opening = [] if prompt is None else messages_of(prompt, "prompt")
    num = len(opening)
    if opening and all(answer[:num] == opening and len(answer) > num for answer in answers):
        return opening, [answer[num:] for answer in answers]
    shared = _shared_turns(*answers)
    last = answers[0][shared - 1].get("content") if shared else None
    if prompt is None or (isinstance(prompt, str) and shared and last == prompt):
        return answers[0][:shared], [answer[shared:] for answer in answers]
    return opening, answers


_OURS = ("tokenize", "add_generation_prompt", "continue_final_message", "conversation")
"""What the template is asked for by us, and by no row."""


def told_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row tells the chat template: its `tools`, as a list or its JSON, and the variables in
    `chat_template_kwargs`.
    """
    tools = _unpacked(row.get("tools"), "tools", "a list")
    variables = _unpacked(row.get("chat_template_kwargs"), "chat_template_kwargs", "a mapping")
    told = {} if not tools else {"tools": tools}
    if not variables:
        return told
    if not isinstance(variables, Mapping):
        raise BadRow("chat_template_kwargs is no mapping")
    for name in variables:
        if name in _OURS or name.startswith("return_"):
            raise BadRow(f"chat_template_kwargs holds {name!r}, which is no variable of a template")
    # Arrow tables give every row the keys of all rows, with None where a row had none.
    return told | {name: value for name, value in variables.items() if value is not None}


def _unpacked(value: Any, name: str, what: str) -> Any:
    """A value that csv files and strict tables hold as JSON."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value) or None
    except ValueError as error:
        raise BadRow(f"{name} is no JSON", f"{name} must be {what} or its JSON: {error}") from error


def _shared_turns(first: Messages, *others: Messages) -> int:
    """How many first messages conversations share, leaving each at least its last one."""
    limit = min(map(len, (first, *others))) - 1
    shared = next((i for i in range(limit) if any(first[i] != o[i] for o in others)), limit)
    while shared > 0 and first[shared - 1]["role"] == "assistant":
        shared -= 1
    return shared


def render_prompt(tokenizer: Any, prompt: Any, *, chat: bool) -> str:
    """A prompt to be answered; `chat` wraps a bare string as a user's turn.

    Raises:
        DataError: for messages that cannot be rendered.
    """
    if isinstance(prompt, str) and not chat:
        return prompt
    try:
        messages = (
            [{"role": "user", "content": prompt}]
            if isinstance(prompt, str)
            else messages_of(prompt, "prompt")
        )
        return render(tokenizer, messages, generation_prompt=True)
    except BadRow as bad:
        raise DataError(f"The prompt {prompt!r} cannot be answered: {bad}.") from bad


def single_bos(tokenizer: Any, ids: Any) -> Any:
    """Ids without the second of two leading bos: one was written out and one added."""
    doubled = len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id
    return ids[1:] if doubled else ids


def left_open(tokenizer: Any, text: str, ids: Any) -> Any:
    """Ids of a plain prompt, without the eos by which some tokenizers close every text."""
    ids = single_bos(tokenizer, ids)
    closed = len(ids) > 0 and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if closed and not text.endswith(tokenizer.eos_token) else ids


def prompt_of(tokenizer: Any, row: Mapping[str, Any]) -> Any:
    """What a row asks, as `sample` takes it; None where nothing is asked."""
    if is_messages(row.get("messages")):
        return _asked(list(row["messages"]))
    if row.get("prompt") is not None:
        return row["prompt"]
    if row.get("prompt_ids") is not None:
        return tokenizer.decode(row["prompt_ids"])
    answers: list[Any] = [row.get("chosen"), row.get("rejected")]
    if all(isinstance(answer, str) for answer in answers):
        shortest = min(map(len, answers))
        length = next((i for i in range(shortest) if answers[0][i] != answers[1][i]), shortest)
        return re.sub(r"\S+$", "", answers[0][:length]) or None  # up to the last whole word
    if all(is_messages(answer) for answer in answers):
        return answers[0][: _shared_turns(*answers)] or None
    return None


def _asked(messages: Messages) -> Messages | None:
    """A conversation without the assistant's messages at its end."""
    while messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    return messages or None


def prompt_text(prompt: Any) -> str:
    """A prompt as a person reads it: the last user turn of a conversation, or the string."""
    if isinstance(prompt, str):
        return prompt
    turns = [str(m.get("content", "")) for m in prompt if m.get("role") == "user"]
    return turns[-1] if turns else str(prompt[-1].get("content", ""))
