"""Preference rows of the text wing as prepared examples: pairs, rankings, single answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignkit.batches import Batch
from alignkit.columns import SAME, TIE, BadRow, Column, Sieve, check_columns
from alignkit.errors import DataError
from alignkit.labels import Label, Labels, group_label, pair_label, single_label
from alignkit.options import TextOptions
from alignkit.rows import Rows
from alignkit.text.content import Ids, TextContent
from alignkit.text.formats import Rendered, is_messages, render_answers
from alignkit.text.tokens import PAIR_IDS, Limits, Splitter, ids_of, tokenise

LAYOUTS: Mapping[str, tuple[tuple[Column, ...], ...]] = {
    "pairs": (("chosen", "rejected"), PAIR_IDS),
    "groups": (("prompt", "responses", ("ranking", "scores")),),
    "unpaired": (("prompt", "completion", "label"),),
}
"""Kind of rows -> the ways to write them; a pair's prompt may be what its answers share."""

IMAGES = ("image", "images")


@dataclass(frozen=True)
class TokenRow:
    """A row as ids: one prompt and its answers; `number` is its place in the data."""

    number: int
    prompt: Ids
    answers: tuple[Ids, ...]


class TextExamples:
    """Prepared rows of a text wing, as `Examples`.

    Attributes:
        rows: the usable rows.
        skipped: reason -> how many rows were left out.
        chat: whether any row was rendered by the chat template.
    """

    def __init__(
        self,
        rows: Sequence[TokenRow],
        labels: Sequence[Label],
        skipped: Mapping[str, int],
        chat: bool,
    ) -> None:
        self.rows = rows
        self.labels = Labels([row.number for row in rows], labels)
        self.skipped = skipped
        self.chat = chat

    def __len__(self) -> int:
        return len(self.rows)

    def collate(self, indices: Sequence[int], epochs: Sequence[int]) -> Batch:
        rows = [self.rows[index] for index in indices]
        content = TextContent(
            prompts=tuple(row.prompt for row in rows),
            completions=tuple(answer for row in rows for answer in row.answers),
            owner=tuple(place for place, row in enumerate(rows) for _ in row.answers),
        )
        return self.labels.batch(content, indices)

    def mismatched(self, indices: Sequence[int]) -> list[int]:
        return self.labels.mismatched(indices, [self.rows[i].prompt.tobytes() for i in indices])


def read_examples(rows: Rows, tokenizer: Any, options: TextOptions, kind: str) -> TextExamples:
    """Check, tokenise and cut preference rows.

    Args:
        rows: with the columns of `LAYOUTS`; texts are strings or messages. On any kind `weight`, on
            pairs `margin`, `p_chosen`, `score_chosen` and `score_rejected`.
        tokenizer: of the policy; not changed.
        options: limits and policies.
        kind: "pairs", "groups" or "unpaired".

    Raises:
        DataError: for missing columns, or for a bad row under `on_bad_row="error"`.
    """
    sieve = Sieve(rows, options.on_bad_row)
    read = []
    for number, row in enumerate(rows):
        _refuse_images(row, rows.name)
        check_columns(row, kind, LAYOUTS, rows.name)
        with sieve.guard(number):
            read.append((number, *_READERS[kind](tokenizer, row)))
    tokens = tokenise(tokenizer, [item for _, item, _ in read if isinstance(item, Rendered)])
    splitter, limits = Splitter(tokenizer, tokens), Limits(options)
    usable, labels = [], []
    for number, item, label in read:
        with sieve.guard(number):
            prompt, answers = splitter.split(item) if isinstance(item, Rendered) else item
            cut = TokenRow(number, *limits.cut(splitter.begun(prompt), answers))
            if _teaches(cut, label, kind, sieve, options):
                usable.append(cut)
                labels.append(label)
    limits.warn(rows.name)
    splitter.warn(rows.name)
    sieve.warn()
    chat = any(isinstance(item, Rendered) and item.chat for _, item, _ in read)
    return TextExamples(usable, labels, dict(sieve.skipped), chat)


Tokens = tuple[Ids, tuple[Ids, ...]]
"""A prompt and its answers as ids."""


def _pair(tokenizer: Any, row: Mapping[str, Any]) -> tuple[Rendered | Tokens, Label]:
    label = pair_label(row)
    if PAIR_IDS[0] in row:
        prompt, *answers = (ids_of(row, column) for column in PAIR_IDS)
        return (prompt, tuple(answers)), label
    answers_of = {name: row[name] for name in ("chosen", "rejected")}
    return render_answers(tokenizer, row.get("prompt"), answers_of, row.get("tools")), label


def _group(tokenizer: Any, row: Mapping[str, Any]) -> tuple[Rendered | Tokens, Label]:
    responses = row["responses"]
    if not is_messages(responses):
        raise BadRow("bad responses", f"responses is a list of answers; got {responses!r}")
    places, label = group_label(row, len(responses))
    answers = {f"responses[{place}]": responses[place] for place in places}
    return render_answers(tokenizer, row["prompt"], answers, row.get("tools")), label


def _single(tokenizer: Any, row: Mapping[str, Any]) -> tuple[Rendered | Tokens, Label]:
    answers = {"completion": row["completion"]}
    rendered = render_answers(tokenizer, row["prompt"], answers, row.get("tools"))
    return rendered, single_label(row)


_READERS: Mapping[str, Callable[[Any, Mapping[str, Any]], tuple[Rendered | Tokens, Label]]] = {
    "pairs": _pair,
    "groups": _group,
    "unpaired": _single,
}


def _teaches(row: TokenRow, label: Label, kind: str, sieve: Sieve, options: TextOptions) -> bool:
    """Whether the row prefers something; if not, it is left out by policy."""
    if kind == "unpaired":
        return True
    first = row.answers[0]
    same = all(np.array_equal(first, other) for other in row.answers[1:])
    if same and options.identical_pairs != "keep":
        how = options.identical_pairs
        sieve.leave_out(row.number, SAME[kind], option="identical_pairs", how=how, fix="skip")
        return False
    if label.tie:
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
