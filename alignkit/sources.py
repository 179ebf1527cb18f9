"""Offline rows as a batch source: own replayable shuffle, no row dropped, none lost on resume."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from alignkit.batches import Batch
from alignkit.errors import CheckpointError, DataError
from alignkit.examples import Examples
from alignkit.orders import Mixed, Shuffled
from alignkit.protocols import Collective


class RowSource:
    """Global batches of `batch_size` rows, run on across epochs; this process's share of each.

    The order of epoch e is a permutation keyed by (seed, e); of a mixture, an order of its sets and
    a permutation of each. So the whole state is one number: how many rows have been consumed. Rows
    go to processes in contiguous blocks; which process sees a row changes nothing, because draws
    are keyed by the row's position in the global batch.

    Args:
        examples: the wing's prepared rows.
        batch_size: rows per optimizer step, over all processes.
        epochs: passes over the data; None is endless (then the trainer's `max_steps` bounds it).
        seed: of the shuffle.
        shuffle: False keeps the order of the data (evaluation, benchmarks).
        mismatched: fill in `Batch.mismatched`, for losses of single answers that estimate a KL from
            answers to other prompts. Which answer meets which prompt is decided on the global
            batch, so that it depends on no process or micro-batch.
        processes: rank and size.

    Raises:
        DataError: if there are no rows.
    """

    at_boundary = True

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        epochs: float | None,
        seed: int,
        processes: Collective,
        shuffle: bool = True,
        mismatched: bool = False,
    ) -> None:
        self.num_rows = len(examples)
        if self.num_rows == 0:
            raise DataError(
                "There is nothing to train on: the data has no usable row. "
                f"Skipped: {dict(examples.skipped) or 'none'}."
            )
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.mismatched = mismatched
        self.processes = processes
        self.total_rows = None if epochs is None else max(1, round(epochs * self.num_rows))
        self.consumed = 0
        parts = getattr(examples, "parts", ())
        self._order: Shuffled | Mixed = (
            Mixed(parts, seed, shuffle=shuffle)
            if parts
            else Shuffled(self.num_rows, seed, shuffle=shuffle)
        )
        self._fingerprint: str | None = None

    @property
    def total_steps(self) -> int | None:
        return None if self.total_rows is None else math.ceil(self.total_rows / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        while self.total_rows is None or self.consumed < self.total_rows:
            end = self.consumed + self.batch_size
            if self.total_rows is not None:
                end = min(end, self.total_rows)
            places = range(self.consumed, end)
            # Counted before the batch is handed out: a checkpoint taken while the consumer works on
            # this batch is taken after its step.
            self.consumed = end
            yield self._share(places)

    def once(self) -> Iterator[Batch]:
        """The whole of it from the start, without moving on: for evaluation, again and again."""
        assert self.total_rows is not None, "an endless source has no end to evaluate to"
        for begin in range(0, self.total_rows, self.batch_size):
            yield self._share(range(begin, min(begin + self.batch_size, self.total_rows)))

    def preview(self, steps: int) -> Iterator[Batch]:
        """What the first `steps` batches hold between them, over all processes, without moving on.

        A row that comes again in a later epoch is left out, unless it meets another answer there.
        """
        alone = copy.copy(self)
        alone.processes = SimpleNamespace(rank=0, size=1)
        total = min(steps * self.batch_size, self.total_rows or steps * self.batch_size)
        if not self.mismatched:
            total = min(total, self.num_rows)
        for begin in range(0, total, self.batch_size):
            yield alone._share(range(begin, min(begin + self.batch_size, total)))

    def _share(self, places: range) -> Batch:
        drawn = [self._order.row(place) for place in places]
        return share(self.examples, drawn, self.processes, mismatched=self.mismatched)

    def facts(self) -> dict[str, Any]:
        """What the report says of the rows; of a mixture also how many came from each set."""
        facts = {"used": self.num_rows, "skipped": dict(self.examples.skipped)}
        if isinstance(self._order, Mixed):
            facts["drawn"] = self._order.drawn(self.consumed)
        return facts

    def state_dict(self) -> dict[str, Any]:
        return {
            "consumed": self.consumed,
            "num_rows": self.num_rows,
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """Of the rows; made once."""
        if self._fingerprint is None:
            self._fingerprint = self.examples.fingerprint()
        return self._fingerprint

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("num_rows") != self.num_rows:
            raise CheckpointError(
                f"The checkpoint was made on {state.get('num_rows', 'streamed')} usable rows, the "
                f"data now has {self.num_rows}. Give the same data, or start anew with "
                'resume="never".'
            )
        if state["fingerprint"] != self.fingerprint():
            raise CheckpointError(
                f"The checkpoint was made on other rows: there are {self.num_rows} as then, and "
                "their contents have changed. Give the same data and data_options, or start anew "
                'with resume="never".'
            )
        self.consumed = state["consumed"]


def share(
    examples: Examples,
    whole: Sequence[tuple[int, int]],
    processes: Collective,
    *,
    mismatched: bool,
) -> Batch:
    """This process's share of a global batch.

    Args:
        examples: with the rows.
        whole: (epoch, row) of the global batch.
        processes: rank and size.
        mismatched: see `RowSource`.
    """
    rank, size, num = processes.rank, processes.size, len(whole)
    positions = range(rank * num // size, (rank + 1) * num // size)
    # A process without a row gets a copy of the first one, with weight 0, to keep in step.
    absent = len(positions) == 0
    positions = range(1) if absent else positions
    drawn = [whole[position] for position in positions]
    batch = _mismatch(examples, whole, positions) if mismatched else _collated(examples, drawn)
    position = torch.tensor(list(positions), dtype=torch.int64)
    batch = replace(batch, position=position)
    if batch.mismatched is not None:
        batch = replace(batch, mismatched=replace(batch.mismatched, position=position))
    return batch.absent() if absent else batch


def _collated(examples: Examples, drawn: Sequence[tuple[int, int]]) -> Batch:
    return examples.collate([row for _, row in drawn], [epoch for epoch, _ in drawn])


def _mismatch(examples: Examples, whole: Sequence[tuple[int, int]], positions: range) -> Batch:
    """The batch with its prompts once more, each with the answer of another row."""
    others = examples.mismatched([row for _, row in whole])
    drawn = [whole[position] for position in positions]
    both = _collated(examples, [*drawn, *(whole[others[position]] for position in positions)])
    num = len(drawn)
    batch = both.select(range(num))
    if batch.num_answers != num:
        raise DataError("Only single answers can be put to other prompts; got pairs or groups.")
    content = both.content.recombine(range(num), range(num, 2 * num))
    return replace(batch, mismatched=replace(batch, content=content))
