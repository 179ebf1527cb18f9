"""Text rows that are prepared a part at a time, as the source asks for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from alignkit.stream import Stream
from alignkit.text.data import Reader, numbered_from
from alignkit.text.examples import TextExamples

FIRST = 64
"""Rows that are read at once, so that what is wrong with all rows shows before training."""


class TextStream:
    """See `alignkit.examples.StreamedExamples`.

    Args:
        stream: the raw rows.
        reader: makes what checks, tokenises and cuts them.
        check: called with what has been prepared; raises for what the model cannot take.
        first: the number of the first row.

    Attributes:
        chat: whether rows are rendered by the chat template.
    """

    def __init__(
        self,
        stream: Stream,
        reader: Callable[[], Reader],
        check: Callable[[TextExamples], None],
        first: int = 0,
    ) -> None:
        self.stream = stream
        self._first = first
        self._check = check
        trial, some = reader(), list(islice(stream, FIRST))
        trial.read(enumerate(some))
        trial.warn(f"{stream.name}, of its first {len(some)} rows")
        self.chat = trial.chat
        self._reader = reader()
        self._reader.recognise(some[0])

    def prepare(self, numbered: Sequence[tuple[int, Mapping[str, Any]]]) -> TextExamples:
        before = Counter(self._reader.skipped)
        rows, labels = self._reader.read(numbered)
        skipped = Counter(self._reader.skipped) - before
        examples = TextExamples(
            numbered_from(self._first, rows), labels, skipped, self._reader.chat
        )
        self._check(examples)
        return examples

    def merge(self, rows: Sequence[tuple[Any, int]]) -> TextExamples:
        return TextExamples(
            [part.rows[place] for part, place in rows],
            [part.labels.labels[place] for part, place in rows],
            {},
            self.chat,
        )
