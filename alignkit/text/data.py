"""Preference rows as token ids: each text rendered and tokenised once, cut by stated rules."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from alignkit.batches import Batch
from alignkit.errors import DataError
from alignkit.options import TextOptions
from alignkit.text.columns import NEUTRAL, TOKENS, check_columns, numbers_of
from alignkit.text.content import Ids, TextContent
from alignkit.text.formats import BadRow, Rendered, left_open, render_pair, single_bos

log = logging.getLogger("alignkit")


@dataclass(frozen=True)
class TokenPair:
    """A row as ids: one prompt, two completions; `number` is its place in the data."""

    number: int
    prompt: Ids
    chosen: Ids
    rejected: Ids


class TextPairs:
    """Preference pairs of a text wing, as `Examples`."""

    def __init__(
        self,
        pairs: Sequence[TokenPair],
        columns: Mapping[str, np.ndarray],
        skipped: Mapping[str, int],
        chat: bool,
    ) -> None:
        self.pairs = pairs
        self.columns = columns
        self.skipped = skipped
        self.chat = chat

    def __len__(self) -> int:
        return len(self.pairs)

    def collate(self, indices: Sequence[int], epochs: Sequence[int]) -> Batch:
        pairs = [self.pairs[index] for index in indices]
        num = len(pairs)
        completions = [ids for pair in pairs for ids in (pair.chosen, pair.rejected)]
        columns: dict[str, Any] = {
            name: torch.from_numpy(values[list(indices)]) for name, values in self.columns.items()
        }
        return Batch(
            content=TextContent(
                prompts=tuple(pair.prompt for pair in pairs),
                completions=tuple(completions),
                owner=tuple(place // 2 for place in range(2 * num)),
            ),
            group=torch.arange(2 * num) // 2,
            rank=torch.arange(2 * num) % 2,
            position=torch.arange(num),
            row_id=torch.tensor([pair.number for pair in pairs]),
            **columns,
        )


def read_pairs(rows: Any, tokenizer: Any, options: TextOptions) -> TextPairs:
    """Check, tokenise and cut preference rows.

    Args:
        rows: sequence of dicts with `prompt`, `chosen`, `rejected` (strings or messages), or
            `chosen` and `rejected` sharing their first part, or `prompt_ids`, `chosen_ids`,
            `rejected_ids`; optional `weight`, `margin`, `p_chosen`.
        tokenizer: of the policy; not changed.
        options: limits and policies.

    Raises:
        DataError: for missing columns, or for a bad row under `on_bad_row="error"`.
    """
    reader = _Reader(tokenizer, options, name=getattr(rows, "name", "the data"))
    rendered: list[tuple[int, Rendered | Mapping[str, Any]]] = []
    numbers: dict[str, list[float]] = {}
    for number, row in enumerate(rows):
        check_columns(row, reader.name)
        with reader.guard(number):
            values = numbers_of(row)
            rendered.append((number, row if TOKENS[0] in row else render_pair(tokenizer, row)))
            for column, value in values.items():
                numbers.setdefault(column, [float("nan")] * number).append(value)
        for held in numbers.values():
            held.extend([float("nan")] * (number + 1 - len(held)))
    tokens = _tokenise(tokenizer, [r for _, r in rendered if isinstance(r, Rendered)])
    pairs: list[TokenPair] = []
    for number, item in rendered:
        with reader.guard(number):
            triple = reader.split(item, tokens) if isinstance(item, Rendered) else reader.ids(item)
            pair = reader.finish(number, *triple)
            if pair is not None:
                pairs.append(pair)
    reader.warn()
    places = [pair.number for pair in pairs]
    columns = {
        name: np.nan_to_num(np.asarray(values, dtype=np.float32)[places], nan=NEUTRAL[name])
        for name, values in numbers.items()
    }
    chat = any(isinstance(item, Rendered) and item.chat for _, item in rendered)
    return TextPairs(pairs, columns, dict(reader.skipped), chat)


def _tokenise(tokenizer: Any, rendered: Sequence[Rendered]) -> dict[tuple[str, bool], Ids]:
    """Each distinct text once, in one batched call per kind."""
    tokens: dict[tuple[str, bool], Ids] = {}
    for chat in (True, False):
        items = [item for item in rendered if item.chat == chat]
        texts = dict.fromkeys(
            text for item in items for text in (item.prompt, *item.full) if text is not None
        )
        if not texts:
            continue
        # A chat template has placed BOS and EOS itself; adding them again would double them.
        ids = tokenizer(
            list(texts), add_special_tokens=not chat, return_attention_mask=False, verbose=False
        )["input_ids"]
        for text, one in zip(texts, ids, strict=True):
            tokens[text, chat] = np.asarray(one, dtype=np.int32)
    return tokens


def common_prefix(*ids: Ids) -> int:
    """How many first ids all arrays share."""
    length = min(len(one) for one in ids)
    same = np.ones(length, dtype=bool)
    for one in ids[1:]:
        same &= ids[0][:length] == one[:length]
    return length if same.all() else int(same.argmin())


class _Reader:
    """From rendered rows to token pairs, with the policies for what cannot be used."""

    def __init__(self, tokenizer: Any, options: TextOptions, name: str) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.name = name
        self.eos = tokenizer.eos_token_id
        self.bos = tokenizer.bos_token_id
        self.skipped: Counter[str] = Counter()
        self.truncated = 0
        self.merged = 0
        self.number = -1

    def guard(self, number: int) -> _Reader:
        """A context that turns a `BadRow` into an error or a counted skip, by policy."""
        self.number = number
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        if not isinstance(error, BadRow):
            return False
        if self.options.on_bad_row == "skip":
            self.skipped[str(error)] += 1
            return True
        raise DataError(
            f"Row {self.number} of {self.name} cannot be used: {error}. Mend the row, or leave "
            "such "
            'rows out, counted, with data_options.on_bad_row="skip".'
        ) from None

    def split(self, item: Rendered, tokens: Mapping[tuple[str, bool], Ids]) -> tuple[Ids, Ids, Ids]:
        """Prompt and completions by token ids.

        The prompt ends where the ids of prompt and answers part. Where the tokenizer merges the
        prompt's last characters with the answer's first, that token belongs to the completion.
        """
        full = [self._closed(tokens[text, item.chat], item) for text in item.full]
        known = full
        if item.prompt is not None:
            prompt = tokens[item.prompt, item.chat]
            known = [prompt if item.chat else left_open(self.tokenizer, item.prompt, prompt), *full]
        boundary = common_prefix(*known)
        if item.prompt is None and boundary <= int(not item.chat and full[0][0] == self.bos):
            raise BadRow(
                "there is no prompt column, and chosen and rejected have no first words in common"
            )
        if item.prompt is not None and boundary < len(known[0]):
            self.merged += 1
        # An answer that is a prefix of the other still has its last token as completion.
        boundary = min(boundary, *(len(one) - 1 for one in full))
        return full[0][:boundary], full[0][boundary:], full[1][boundary:]

    def _closed(self, ids: Ids, item: Rendered) -> Ids:
        """Plain text ends with eos and begins with bos once; a chat template places them itself."""
        if item.chat:
            return ids
        ids = single_bos(self.tokenizer, ids)
        if self.eos is not None and (len(ids) == 0 or ids[-1] != self.eos):
            ids = np.append(ids, np.int32(self.eos))
        return ids

    def ids(self, row: Mapping[str, Any]) -> tuple[Ids, Ids, Ids]:
        arrays = []
        for column in TOKENS:
            try:
                array = np.asarray(row[column])
            except (TypeError, ValueError) as error:
                raise BadRow(f"{column} must be a list of token ids") from error
            if array.ndim != 1 or (column != "prompt_ids" and len(array) == 0):
                raise BadRow(f"{column} must be a non-empty list of token ids")
            whole = len(array) == 0 or array.dtype.kind in "iu"
            if not whole or not ((array >= 0) & (array < 2**31)).all():
                raise BadRow(f"{column} must be a list of token ids, integers of at least 0")
            arrays.append(array.astype(np.int32))
        return arrays[0], arrays[1], arrays[2]

    def finish(self, number: int, prompt: Ids, chosen: Ids, rejected: Ids) -> TokenPair | None:
        """The row within the limits, or None if it is left out by policy."""
        if len(prompt) == 0:
            context = self.bos if self.bos is not None else self.eos
            if context is None:
                raise BadRow(
                    "the prompt is empty and the tokenizer has no bos or eos to begin with"
                )
            prompt = np.asarray([context], dtype=np.int32)
        prompt, chosen, rejected = self._cut(prompt, chosen, rejected)
        if np.array_equal(chosen, rejected) and self.options.identical_pairs != "keep":
            if self.options.identical_pairs == "error":
                raise DataError(
                    f"Row {number} of {self.name}: chosen and rejected are the same. Remove the "
                    "row, or "
                    'set data_options.identical_pairs to "skip" or "keep".'
                )
            self.skipped["chosen and rejected are the same"] += 1
            return None
        return TokenPair(number, prompt, chosen, rejected)

    def _cut(self, prompt: Ids, chosen: Ids, rejected: Ids) -> tuple[Ids, Ids, Ids]:
        limit, mode = self.options.max_length, self.options.truncation
        longest = max(len(chosen), len(rejected))
        if len(prompt) + longest <= limit:
            return prompt, chosen, rejected
        if mode == "error":
            raise BadRow(
                f"prompt and answer have {len(prompt) + longest} tokens, above max_length {limit}"
            )
        self.truncated += 1
        if mode == "keep_end":
            # The prompt loses its start, down to one token; the answers keep what then fits.
            prompt = prompt[-max(1, limit - longest) :]
        room = limit - len(prompt)
        if room < 1:
            raise BadRow(
                f"the prompt alone has {len(prompt)} tokens and leaves no room for an answer below "
                f"max_length {limit}"
            )
        return prompt, chosen[:room], rejected[:room]

    def warn(self) -> None:
        if self.truncated:
            log.warning(
                "%s: %d rows were longer than max_length=%d and were cut (truncation=%r).",
                self.name,
                self.truncated,
                self.options.max_length,
                self.options.truncation,
            )
        if self.merged:
            log.warning(
                "%s: in %d rows the prompt's last token merges with the answer's first; that token "
                "counts to the answer.",
                self.name,
                self.merged,
            )
        for reason, count in self.skipped.items():
            log.warning("%s: %d rows left out: %s.", self.name, count, reason)
