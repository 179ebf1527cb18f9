"""Prepared rows of the text wing: ids, and what the data says of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from alignkit.batches import Batch
from alignkit.labels import Label, Labels, fingerprint
from alignkit.orders import Part
from alignkit.text.content import Ids, TextContent


@dataclass(frozen=True)
class TokenRow:
    """A row as ids: one prompt and its answers.

    Attributes:
        number: its place in the data.
        scored: of each answer which tokens count, where not all do.
        source: of a prompt without an answer, the row as the data gave it.
    """

    number: int
    prompt: Ids
    answers: tuple[Ids, ...]
    scored: tuple[np.ndarray, ...] | None = None
    source: Mapping[str, Any] | None = None


class TextExamples:
    """Prepared rows of a text wing, as `Examples`.

    Attributes:
        rows: the usable rows.
        skipped: reason -> how many rows were left out.
        chat: whether any row was rendered by the chat template.
        parts: of a mixture, the sets in the order of their rows.
    """

    def __init__(
        self,
        rows: Sequence[TokenRow],
        labels: Sequence[Label],
        skipped: Mapping[str, int],
        chat: bool,
        parts: Sequence[Part] = (),
    ) -> None:
        self.rows = rows
        self.parts = parts
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
            scored=_scored(rows),
        )
        batch = self.labels.batch(content, indices)
        sources = tuple(row.source for row in rows if row.source is not None)
        return replace(batch, rows=sources) if sources else batch

    def fingerprint(self) -> str:
        parts = (
            [
                *(ids.tobytes() for ids in (row.prompt, *row.answers, *(row.scored or ()))),
                *([] if row.source is None else [_told(row.source)]),
            ]
            for row in self.rows
        )
        return fingerprint(self.labels, parts)

    def mismatched(self, indices: Sequence[int]) -> list[int]:
        return self.labels.mismatched(indices, [self.rows[i].prompt.tobytes() for i in indices])


def _told(source: Mapping[str, Any]) -> bytes:
    """What a row holds for rewards."""
    return json.dumps(source, sort_keys=True, default=repr).encode()


def _scored(rows: Sequence[TokenRow]) -> tuple[np.ndarray, ...] | None:
    if all(row.scored is None for row in rows):
        return None
    return tuple(
        one
        for row in rows
        for one in row.scored or tuple(np.ones(len(ids), dtype=bool) for ids in row.answers)
    )
