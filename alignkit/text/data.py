"""Rows of the text wing as prepared examples: pairs, rankings, single answers, demonstrations."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from alignkit.columns import SAME, TIE, BadRow, Named, Sieve, check_columns
from alignkit.errors import DataError
from alignkit.labels import (
    Label,
    demonstration_label,
)
from alignkit.options import TextOptions
from alignkit.rows import Rows
from alignkit.text.encoding import Encoder, TokensOf
from alignkit.text.examples import TextExamples, TokenRow
from alignkit.text.formats import Rendered
from alignkit.text.layouts import Layout, recognise
from alignkit.text.prompt_rows import Question
from alignkit.text.rated_rows import critique_row, with_margin
from alignkit.text.row_kinds import LAYOUTS, READERS, Tokens
from alignkit.text.supervised import Demonstration, cut, learned, read_demonstration
from alignkit.text.tokens import Limits, Splitter

log = logging.getLogger("alignkit")

IMAGES = ("image", "images")


def read_examples(
    rows: Rows,
    tokenizer: Any,
    options: TextOptions,
    kind: str,
    loss_on: str = "completion",
    first: int = 0,
    room: int = 0,
) -> TextExamples:
    """Check, tokenise and cut all rows of some data, numbered from `first` on; see `Reader`."""
    reader = Reader(rows, tokenizer, options, kind, loss_on, room)
    usable, labels = reader.read(enumerate(rows))
    reader.warn()
    usable = numbered_from(first, usable)
    return TextExamples(usable, labels, dict(reader.skipped), reader.chat)


def numbered_from(first: int, rows: list[TokenRow]) -> list[TokenRow]:
    """Rows with other numbers, where several data sets are one."""
    return [replace(row, number=first + row.number) for row in rows] if first else rows


class Reader:
    """Checks, tokenises and cuts rows, a part of the data at a time.

    Args:
        rows: named in errors. The columns are those of `LAYOUTS`; texts are strings or messages. On
            any kind `weight`, on pairs `margin`, `p_chosen`, `score_chosen` and `score_rejected`.
        tokenizer: of the policy; not changed.
        options: limits and policies.
        kind: a name of `LAYOUTS`.
        loss_on: of supervised rows what is learned: "completion", "assistant" or "all".
        room: tokens that prompts leave for an answer.

    Attributes:
        skipped: reason -> how many rows were left out so far.
        truncated: how many rows were cut so far.
        chat: whether any row was rendered by the chat template.
    """

    def __init__(
        self,
        rows: Named,
        tokenizer: Any,
        options: TextOptions,
        kind: str,
        loss_on: str = "completion",
        room: int = 0,
    ) -> None:
        self._name = rows.name
        self._tokenizer = tokenizer
        self._options = options
        self._kind = kind
        self._loss_on = loss_on
        self._sieve = Sieve(rows, options.on_bad_row)
        self._encoder = Encoder(tokenizer)
        self._splitter = Splitter(tokenizer)
        self._limits = Limits(options, room)
        self._template = bool(getattr(tokenizer, "chat_template", None))
        self._layout: Layout | None = None
        self._seen = False
        self.chat = False

    @property
    def skipped(self) -> Mapping[str, int]:
        return self._sieve.skipped

    @property
    def truncated(self) -> int:
        return self._limits.truncated

    def read(
        self, numbered: Iterable[tuple[int, Mapping[str, Any]]]
    ) -> tuple[list[TokenRow], list[Label]]:
        """The usable ones of some rows, given with their numbers, and what they say of answers.

        Raises:
            DataError: for missing columns, or for a bad row under `on_bad_row="error"`.
        """
        read = []
        for number, row in numbered:
            _refuse_images(row, self._name)
            with self._sieve.guard(number):
                ours = with_margin(self._ours(row), self._options.margins)
                check_columns(ours, self._kind, LAYOUTS, self._name)
                read.append((number, *self._items(ours)))
        texts = [getattr(one, "texts", one) for _, one, _ in read]
        rendered = [item for item in texts if isinstance(item, Rendered)]
        self.chat = self.chat or any(item.chat for item in rendered)
        tokens = self._encoder.encode(rendered)
        usable: list[TokenRow] = []
        labels: list[Label] = []
        for number, item, label in read:
            with self._sieve.guard(number):
                if isinstance(item, Question):
                    usable.append(item.row(number, self._splitter, tokens, self._limits))
                    labels.append(label)
                    continue
                if isinstance(item, Demonstration):
                    pieces = cut(item.mark(self._splitter, tokens), self._limits, plain=item.plain)
                    usable += [learned(number, piece) for piece in pieces]
                    labels += [label] * len(pieces)
                    continue
                found = self._cut(number, item, tokens)
                if _teaches(found, label, self._kind, self._sieve, self._options):
                    usable += _apart(found) if isinstance(label, tuple) else [found]
                    labels += label if isinstance(label, tuple) else [label]
        return usable, labels

    def recognise(self, first: Mapping[str, Any]) -> None:
        """Read all rows as the layout that the data's first row has."""
        self._seen = True
        self._layout = recognise(first, self._kind)

    def _ours(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row in our columns, where the first one was recognised as a published layout."""
        if not self._seen:
            self.recognise(row)
            if self._layout is not None:
                log.warning("%s: read as %s, by its columns.", self._name, self._layout.name)
        if self._layout is None:
            return row
        if not all(name in row for name in self._layout.columns):
            raise BadRow(f"not all columns of {self._layout.name} are there")
        return {**_beside(row, self._kind), **self._layout.to(self._kind)(row, self._template)}

    def _items(self, row: Mapping[str, Any]) -> tuple[Any, Any]:
        """What is to be tokenised of a row in our columns, and what it says of its answers."""
        if self._kind == "critiques":
            row = critique_row(row, self._template)
        if self._kind in ("supervised", "critiques"):
            item = read_demonstration(self._tokenizer, row, self._loss_on)
            self.chat = self.chat or item.chat
            return item, demonstration_label(row)
        return READERS[self._kind](self._tokenizer, row)

    def _cut(self, number: int, item: Rendered | Tokens, tokens: TokensOf) -> TokenRow:
        splitter = self._splitter
        prompt, answers = splitter.split(item, tokens) if isinstance(item, Rendered) else item
        return TokenRow(number, *self._limits.cut(splitter.begun(prompt), answers))

    def warn(self, name: str | None = None) -> None:
        """Say how many rows were cut or left out, and why."""
        self._limits.warn(name or self._name)
        self._splitter.warn(name or self._name)
        self._sieve.warn(name)
        if self._kind == "prompts" and self._template and not self.chat:
            log.warning(
                "%s: the prompts are strings, which are taken as they are. For the tokenizer's "
                "chat template, write them as messages.",
                name or self._name,
            )


def _apart(row: TokenRow) -> list[TokenRow]:
    """A pair as two rows of one answer each."""
    return [replace(row, answers=(answer,)) for answer in row.answers]


def _beside(row: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """What any row may say beside its answers; a prompt's row says all of it to the reward."""
    if kind == "prompts":
        return row
    return {name: row[name] for name in _ON_ANY_ROW if name in row}


_ON_ANY_ROW = ("weight", "margin", "p_chosen", "tools", "chat_template_kwargs")


def _teaches(
    row: TokenRow,
    label: Label | tuple[Label, ...],
    kind: str,
    sieve: Sieve,
    options: TextOptions,
) -> bool:
    """Whether the row prefers something; if not, it is left out by policy."""
    if len(row.answers) == 1:
        return True
    first = row.answers[0]
    same = all(np.array_equal(first, other) for other in row.answers[1:])
    if same and options.identical_pairs != "keep":
        how = options.identical_pairs
        sieve.leave_out(
            row.number, SAME.get(kind, SAME["pairs"]), option="identical_pairs", how=how, fix="skip"
        )
        return False
    if isinstance(label, Label) and label.tie:
        sieve.skipped[TIE] += 1
        return False
    return True


def _refuse_images(row: Mapping[str, Any], name: str) -> None:
    images = [column for column in IMAGES if row.get(column)]
    if images:
        raise DataError(
            f"{name} has image columns {images}: vision-language policies are not supported. "
            "Remove the columns, or give a diffusion pipeline as policy."
        )
