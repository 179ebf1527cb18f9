"""Demonstrations as token ids: which tokens of a row are learned, and which are context.

A conversation is rendered whole. Its assistant's turns are found in it by the template's own
`{% generation %}` marks, or else by token ids: a turn lies between what the template writes of the
messages before it, asking for an answer, and of those up to it. Nothing is cut on characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from alignkit.columns import BadRow
from alignkit.errors import DataError
from alignkit.options import TextOptions
from alignkit.text.content import Ids
from alignkit.text.encoding import TokensOf
from alignkit.text.examples import TokenRow
from alignkit.text.formats import (
    Messages,
    Rendered,
    is_messages,
    messages_of,
    render,
    render_answers,
    told_of,
)
from alignkit.text.tokens import SUPERVISED_IDS, Limits, Splitter, common_prefix, ids_of

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NO_TURN = "the conversation has no message of the assistant"


@dataclass(frozen=True)
class Marked:
    """A row as ids.

    Attributes:
        ids: of the whole row.
        scored: as long, True on the tokens to learn; the first one never is, since nothing
            predicts it.
        answer: whether what is learned is one answer at the row's end, whose beginning counts more
            than its prompt's.
    """

    ids: Ids
    scored: np.ndarray
    answer: bool = False


@dataclass(frozen=True)
class Demonstration:
    """A row on its way to ids.

    Attributes:
        texts: what is to be tokenised; None if it is ids already.
        mark: makes ids of it, and says which are learned.
        plain: a text without a prompt, which may be split.
        chat: rendered by the chat template.
    """

    texts: Rendered | None
    mark: Callable[[Splitter, TokensOf], Marked]
    plain: bool = False
    chat: bool = False


def read_demonstration(tokenizer: Any, row: Mapping[str, Any], loss_on: str) -> Demonstration:
    """A row in any of the accepted shapes.

    Args:
        tokenizer: its chat template renders messages.
        row: with `messages`, or `prompt` and `completion` (texts, messages or ids), or `text`.
        loss_on: "completion", "assistant" or "all".

    Raises:
        BadRow: if the row cannot be used.
        DataError: if no row of this kind could be.
    """
    whole, told = loss_on == "all", told_of(row)
    if loss_on == "assistant":
        return _turns(tokenizer, _conversation(row), told)
    if "messages" in row:
        messages = messages_of(row["messages"], "messages")
        if whole:
            text = render(tokenizer, messages, generation_prompt=False, told=told)
            rendered = Rendered(None, (text,), chat=True)
            return Demonstration(rendered, partial(_all, rendered))
        if messages[-1]["role"] != "assistant":
            raise BadRow("the conversation does not end with a message of the assistant")
        answers = {"messages": messages[-1:]}
        rendered = render_answers(tokenizer, messages[:-1] or None, answers, row)
        return Demonstration(rendered, partial(_answer, rendered, whole))
    if "completion" in row:
        answers = {"completion": row["completion"]}
        rendered = render_answers(tokenizer, row["prompt"], answers, row)
        return Demonstration(rendered, partial(_answer, rendered, whole))
    if SUPERVISED_IDS[0] in row:
        prompt, completion = (ids_of(row, column) for column in SUPERVISED_IDS)
        return Demonstration(None, partial(_given, prompt, completion, whole))
    rendered = render_answers(tokenizer, "", {"text": row["text"]}, row)
    return Demonstration(rendered, partial(_all, rendered), plain=True)


def _conversation(row: Mapping[str, Any]) -> Messages:
    """All messages of a row."""
    if is_messages(row.get("messages")):
        return messages_of(row["messages"], "messages")
    parts = [row.get("prompt"), row.get("completion")]
    if not all(is_messages(part) for part in parts):
        raise DataError(
            "loss_on='assistant' learns the assistant's turns of conversations, and a row has no "
            f"messages; got the columns {', '.join(sorted(map(str, row)))}. Write "
            "loss_on='completion' or 'all'."
        )
    return [*messages_of(parts[0], "prompt"), *messages_of(parts[1], "completion")]


# --- what is learned ---------------------------------------------------------------------------


def _joined(splitter: Splitter, prompt: Ids, completion: Ids, whole: bool) -> Marked:
    prompt = splitter.begun(prompt)
    scored = np.arange(len(prompt) + len(completion)) >= (1 if whole else len(prompt))
    return Marked(np.concatenate([prompt, completion]), scored, answer=not whole)


def _given(
    prompt: Ids, completion: Ids, whole: bool, splitter: Splitter, tokens: TokensOf
) -> Marked:
    return _joined(splitter, prompt, completion, whole)


def _answer(rendered: Rendered, whole: bool, splitter: Splitter, tokens: TokensOf) -> Marked:
    prompt, (completion,) = splitter.split(rendered, tokens)
    return _joined(splitter, prompt, completion, whole)


def _all(rendered: Rendered, splitter: Splitter, tokens: TokensOf) -> Marked:
    ids = splitter.closed(tokens[rendered.full[0], rendered.chat], chat=rendered.chat)
    if len(ids) < 2:
        raise BadRow("the text has one token, which nothing predicts")
    return Marked(ids, np.arange(len(ids)) > 0)


def _turns(tokenizer: Any, messages: Messages, told: Mapping[str, Any]) -> Demonstration:
    """The assistant's turns of a conversation."""
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow(_NO_TURN)
    if _MARKS.search(_template(tokenizer, told)):
        marked = _by_marks(tokenizer, messages, told)
        return Demonstration(None, lambda splitter, tokens: marked, chat=True)
    whole = render(tokenizer, messages, generation_prompt=False, told=told)
    parts: list[str] = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if place == 0:
            raise BadRow("the conversation begins with the assistant, which answers nothing")
        before = render(tokenizer, messages[:place], generation_prompt=True, told=told)
        until = render(tokenizer, messages[: place + 1], generation_prompt=False, told=told)
        if not whole.startswith(until):
            raise BadRow(
                "the chat template writes a turn otherwise once others follow it",
                "the chat template writes the assistant's turn in message "
                f"{place} otherwise once others follow it, so what would be learned is never "
                "answered. Write loss_on='completion', which learns the last turn, or give a "
                "template with {% generation %} marks",
            )
        parts += [before, until]
    rendered = Rendered(None, (whole, *parts), chat=True)
    return Demonstration(rendered, partial(_by_boundaries, rendered))


def _by_boundaries(rendered: Rendered, splitter: Splitter, tokens: TokensOf) -> Marked:
    ids, *parts = (tokens[text, True] for text in rendered.full)
    scored = np.zeros(len(ids), dtype=bool)
    for before, until in zip(parts[::2], parts[1::2], strict=True):
        begin, end = common_prefix(before, ids), common_prefix(until, ids)
        splitter.opened += begin < len(before)
        # Where the tokenizer merges the turn's end with what follows, that token is of the turn.
        scored[begin : end + (end < len(until))] = True
    scored[0] = False
    return Marked(ids, scored)


def _template(tokenizer: Any, told: Mapping[str, Any]) -> str:
    """The chat template that a conversation is rendered by; "" if there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    found: str = tokenizer.get_chat_template(told.get("chat_template"), told.get("tools"))
    return found


def _by_marks(tokenizer: Any, messages: Messages, told: Mapping[str, Any]) -> Marked:
    """By the template's own marks around what the assistant writes."""
    render(tokenizer, messages, generation_prompt=False, told=told)  # its refusal is a bad row
    found = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **told
    )
    scored = np.asarray(found["assistant_masks"], dtype=bool)
    if not scored[1:].any():
        raise BadRow(_NO_TURN, f"{_NO_TURN} inside the template's generation marks")
    scored[0] = False
    return Marked(np.asarray(found["input_ids"], dtype=np.int32), scored)


# --- lengths -----------------------------------------------------------------------------------


def cut(row: Marked, limits: Limits, *, plain: bool) -> list[Marked]:
    """The row within `max_length`: cut, or a long text in pieces.

    Raises:
        BadRow: if nothing that is learned would be left, or truncation is refused.
        DataError: for rows that are not plain texts under "split".
    """
    options, over = limits.options, len(row.ids) - limits.options.max_length
    if options.truncation == "split" and not plain:
        raise DataError(
            "truncation='split' makes several rows of a long text, and a prompt would be missing "
            "from all but the first; got rows with a prompt or messages. Write "
            "truncation='keep_start'."
        )
    if over <= 0:
        return [row]
    if options.truncation == "split":
        return _pieces(row, options)
    if options.truncation == "error":
        raise BadRow(
            f"the row is above max_length {options.max_length}",
            f"the row has {len(row.ids)} tokens, above max_length {options.max_length}",
        )
    begin = 0
    if options.truncation == "keep_end":
        # Of an answer, the prompt loses its start, down to one token, before the end is cut.
        begin = min(over, int(row.scored.argmax()) - 1) if row.answer else over
    kept = slice(begin, begin + options.max_length)
    scored = row.scored[kept].copy()
    scored[0] = False
    if not scored.any():
        raise BadRow(
            f"the prompt alone leaves no room for an answer below max_length {options.max_length}"
        )
    limits.truncated += 1
    return [Marked(row.ids[kept], scored, row.answer)]


def _pieces(row: Marked, options: TextOptions) -> list[Marked]:
    """Pieces that overlap by one token, the context of the next: each is learned once."""
    size = options.max_length
    starts = range(0, len(row.ids) - 1, size - 1)
    pieces = [row.ids[start : start + size] for start in starts]
    return [Marked(ids, np.arange(len(ids)) > 0) for ids in pieces]


def learned(number: int, row: Marked) -> TokenRow:
    """From the first learned token to the last is the answer; what comes after teaches nothing."""
    places = row.scored.nonzero()[0]
    begin, end = int(places[0]), int(places[-1]) + 1
    scored = row.scored[begin:end]
    answers = (row.ids[begin:end],)
    return TokenRow(number, row.ids[:begin], answers, None if scored.all() else (scored,))
