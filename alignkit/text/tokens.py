"""From the ids of rendered rows to prompts and answers: split by ids, cut by stated rules."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from alignkit.columns import BadRow
from alignkit.errors import ConfigError
from alignkit.options import TextOptions
from alignkit.text.content import Ids
from alignkit.text.encoding import TokensOf
from alignkit.text.formats import Rendered, left_open, single_bos

log = logging.getLogger("alignkit")

PAIR_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
SUPERVISED_IDS = ("prompt_ids", "completion_ids")
GROUP_IDS = ("prompt_ids", "responses_ids")


def ids_of(row: Mapping[str, Any], column: str) -> Ids:
    """A column of token ids; only a prompt may be empty.

    Raises:
        BadRow: if it is none.
    """
    return _ids(row[column], column)


def ids_of_all(row: Mapping[str, Any], column: str, places: Iterable[int]) -> tuple[Ids, ...]:
    """Some members of a column of lists of token ids, none of them empty.

    Raises:
        BadRow: if one is none.
    """
    return tuple(_ids(row[column][place], f"{column}[{place}]") for place in places)


def _ids(given: Any, column: str) -> Ids:
    try:
        array = np.asarray(given)
    except (TypeError, ValueError) as error:
        raise BadRow(f"{column} must be a list of token ids") from error
    if array.ndim != 1 or (column != PAIR_IDS[0] and len(array) == 0):
        raise BadRow(f"{column} must be a non-empty list of token ids")
    whole = len(array) == 0 or array.dtype.kind in "iu"
    if not whole or not ((array >= 0) & (array < 2**31)).all():
        raise BadRow(f"{column} must be a list of token ids, integers of at least 0")
    return array.astype(np.int32)


def common_prefix(*ids: Ids) -> int:
    """How many first ids all arrays share."""
    length = min(len(one) for one in ids)
    same = np.ones(length, dtype=bool)
    for one in ids[1:]:
        same &= ids[0][:length] == one[:length]
    return length if same.all() else int(same.argmin())


class Splitter:
    """Finds where prompts end, by token ids.

    Args:
        tokenizer: of the policy.

    Attributes:
        merged: in how many plain rows the tokenizer merged prompt and answer.
        opened: in how many chat rows the template opens an answer otherwise than it is asked for.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos = tokenizer.eos_token_id
        self.bos = tokenizer.bos_token_id
        self.merged = self.opened = 0

    def split(self, item: Rendered, tokens: TokensOf) -> tuple[Ids, tuple[Ids, ...]]:
        """Prompt and completions, from the ids of all rendered texts.

        The prompt ends where the ids of prompt and answers part. Where the tokenizer merges the
        prompt's last characters with an answer's first, that token belongs to the completion.
        """
        full = [self.closed(tokens[text, item.chat], chat=item.chat) for text in item.full]
        known = full
        if item.prompt is not None:
            known = [self.asked(item, tokens), *full]
        boundary = common_prefix(*known)
        if item.prompt is None and boundary <= int(not item.chat and full[0][0] == self.bos):
            raise BadRow("there is no prompt column, and the answers have no first words in common")
        if item.prompt is not None and boundary < len(known[0]):
            self.opened += item.chat
            self.merged += not item.chat
        # An answer that is a prefix of another still has its last token as completion.
        boundary = min(boundary, *(len(one) - 1 for one in full))
        return full[0][:boundary], tuple(one[boundary:] for one in full)

    def asked(self, item: Rendered, tokens: TokensOf) -> Ids:
        """The ids of a prompt alone."""
        assert item.prompt is not None
        ids = tokens[item.prompt, item.chat]
        return ids if item.chat else left_open(self.tokenizer, item.prompt, ids)

    def closed(self, ids: Ids, *, chat: bool) -> Ids:
        """Plain text ends with eos and begins with bos once; a chat template places them itself."""
        if chat:
            return ids
        ids = single_bos(self.tokenizer, ids)
        if self.eos is not None and (len(ids) == 0 or ids[-1] != self.eos):
            ids = np.append(ids, np.int32(self.eos))
        return ids

    def begun(self, prompt: Ids) -> Ids:
        """The prompt with at least one token: a model predicts nothing from nothing."""
        if len(prompt):
            return prompt
        context = self.bos if self.bos is not None else self.eos
        if context is None:
            raise BadRow("the prompt is empty and the tokenizer has no bos or eos to begin with")
        return np.asarray([context], dtype=np.int32)

    def warn(self, name: str) -> None:
        """Say in how many rows of the data the prompt did not end where the answers begin."""
        if self.merged:
            log.warning(
                "%s: in %d rows the prompt's last token merges with the answer's first; that token "
                "counts to the answer.",
                name,
                self.merged,
            )
        if self.opened:
            log.warning(
                "%s: in %d rows the chat template asks for an answer in other words than those by "
                "which it opens the one that is given; what differs counts to the answer.",
                name,
                self.opened,
            )


class Limits:
    """Cuts rows to `max_length`.

    Args:
        options: with the limit.
        room: tokens that a prompt without an answer leaves for one.

    Attributes:
        truncated: how many rows were cut.
    """

    def __init__(self, options: TextOptions, room: int = 0) -> None:
        if room >= options.max_length:
            raise ConfigError(
                f"data_options.max_length bounds a prompt and its answer; {options.max_length} "
                f"leaves no prompt before an answer of generation.max_new_tokens={room}. Set "
                f"data_options.max_length above {room}."
            )
        self.options = options
        self.room = max(1, room)
        self.truncated = 0

    def cut_prompt(self, prompt: Ids) -> Ids:
        """A prompt without an answer, within the limit and with room for one.

        Raises:
            BadRow: it is longer, and `truncation` is not "keep_end", which cuts its start.
        """
        limit = self.options.max_length - self.room
        if len(prompt) <= limit:
            return prompt
        if self.options.truncation != "keep_end":
            reason = f"the prompt leaves no room for an answer below max_length {limit + self.room}"
            raise BadRow(
                reason,
                f"{reason}: it has {len(prompt)} tokens, and an answer up to {self.room}; "
                "data_options.truncation='keep_end' cuts a prompt's start",
            )
        self.truncated += 1
        return prompt[-limit:]

    def cut(self, prompt: Ids, answers: tuple[Ids, ...]) -> tuple[Ids, tuple[Ids, ...]]:
        """Prompt and answers within the limit; all answers keep the same prompt.

        Raises:
            BadRow: no answer would fit, or truncation is refused.
        """
        limit, mode = self.options.max_length, self.options.truncation
        longest = max(map(len, answers))
        if len(prompt) + longest <= limit:
            return prompt, answers
        if mode == "error":
            raise BadRow(
                f"prompt and answer are above max_length {limit}",
                f"prompt and answer have {len(prompt) + longest} tokens, above max_length {limit}",
            )
        if mode == "keep_end":
            # The prompt loses its start, down to one token; the answers keep what then fits.
            prompt = prompt[-max(1, limit - longest) :]
        room = limit - len(prompt)
        if room < 1:
            raise BadRow(
                f"the prompt alone leaves no room for an answer below max_length {limit}",
                f"the prompt alone has {len(prompt)} tokens and leaves no room for an answer below "
                f"max_length {limit}",
            )
        self.truncated += 1
        return prompt, tuple(answer[:room] for answer in answers)

    def warn(self, name: str) -> None:
        """Say how many rows of the data were cut."""
        if self.truncated:
            log.warning(
                "%s: %d rows were longer than max_length=%d and were cut (truncation=%r).",
                name,
                self.truncated,
                self.options.max_length,
                self.options.truncation,
            )
