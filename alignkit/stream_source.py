"""Streamed rows as a batch source: replayable shuffle, prepared ahead, no row lost on resume."""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from types import SimpleNamespace
from typing import Any

from alignkit.batches import Batch
from alignkit.draws import generator
from alignkit.errors import CheckpointError, DataError
from alignkit.examples import Examples, StreamedExamples
from alignkit.protocols import Collective
from alignkit.sources import share

CHUNK = 256
"""Rows that are prepared together."""


@dataclass(frozen=True)
class Place:
    """Where in a stream something is.

    Attributes:
        epoch: passes over the stream before this one.
        unit, offset: the buffer begins at this unit of the epoch's order, after so many rows of it.
        buffer: how many buffers the epoch had before this one.
        start: rows of the buffer, in its shuffled order, before the chunk.
        used: usable rows of the chunk that have been handed out.
        usable: usable rows of the epoch before the chunk.
    """

    epoch: int = 0
    unit: int = 0
    offset: int = 0
    buffer: int = 0
    start: int = 0
    used: int = 0
    usable: int = 0


class Cursor:
    """The usable rows of one stream, for ever, in an order that is a function of the seed.

    The units of an epoch are put in an order keyed by (seed, epoch), and read one after the other.
    So many rows as the buffer holds are put in an order keyed by (seed, epoch, buffer), handed out,
    and followed by the next so many. A place is therefore a few numbers: the buffer is read again
    from where it began.

    Args:
        rows: of the wing.
        buffer: rows that are shuffled together.
        seed: of the shuffle.
        shuffle: False keeps the order of the data.
    """

    def __init__(self, rows: StreamedExamples, *, buffer: int, seed: int, shuffle: bool) -> None:
        self.rows = rows
        self.place = Place()
        self.skipped: Counter[str] = Counter()
        self._size = buffer
        self._seed = seed
        self._shuffle = shuffle
        self._expected: str | None = None
        self._fingerprint: str | None = None

    def __iter__(self) -> Iterator[tuple[int, Examples, int]]:
        """(epoch, prepared rows, place among them), from where the cursor stands."""
        for place, examples in _ahead(self._chunks(self.place)):
            self._fingerprint = examples.fingerprint()
            self._compare()
            if place.used == 0:
                self.skipped.update(examples.skipped)
            for used in range(place.used, len(examples)):
                self.place = replace(place, used=used + 1)
                yield place.epoch, examples, used

    def _compare(self) -> None:
        if self._expected not in (None, self._fingerprint):
            raise CheckpointError(
                f"The checkpoint was made on other rows than {self.rows.stream.name} has now: "
                "those where it stopped have changed. Give the same data and data_options, or "
                'start anew with resume="never".'
            )
        self._expected = None

    def _chunks(self, place: Place) -> Iterator[tuple[Place, Examples]]:
        while True:
            raw = self._raw(place)
            while numbered := list(islice(raw, self._size)):
                place = yield from self._buffer(place, numbered)
            if place.usable == 0:
                raise DataError(
                    f"There is nothing to train on: {self.rows.stream.name} has no usable row. "
                    f"Skipped: {dict(self.skipped) or 'none'}."
                )
            place = Place(epoch=place.epoch + 1)

    def _raw(self, place: Place) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
        """(place in the order of units, number, row) of the rest of an epoch."""
        for step, unit in enumerate(self._units(place.epoch)[place.unit :], start=place.unit):
            skip = place.offset if step == place.unit else 0
            for number, row in self.rows.stream.read(unit, skip):
                yield step, number, row

    def _units(self, epoch: int) -> list[int]:
        num = self.rows.stream.num_units
        if not self._shuffle:
            return list(range(num))
        return generator("units", self._seed, epoch).permutation(num).tolist()

    def _buffer(
        self, place: Place, numbered: list[tuple[int, int, Mapping[str, Any]]]
    ) -> Generator[tuple[Place, Examples], None, Place]:
        """The chunks of one buffer; returns the place behind it."""
        order = list(range(len(numbered)))
        if self._shuffle:
            draws = generator("stream", self._seed, place.epoch, place.buffer)
            order = draws.permutation(len(numbered)).tolist()
        for start in range(place.start, len(order), CHUNK):
            rows = [numbered[i][1:] for i in order[start : start + CHUNK]]
            examples = self.rows.prepare(rows)
            used = place.used if start == place.start else 0
            yield replace(place, start=start, used=used), examples
            place = replace(place, usable=place.usable + len(examples), start=start, used=0)
        step, number, _ = numbered[-1]
        offset = self.rows.stream.offset(self._units(place.epoch)[step], number) + 1
        return Place(place.epoch, step, offset, place.buffer + 1, usable=place.usable)

    def fork(self) -> Cursor:
        """Another cursor at this place."""
        other = copy.copy(self)
        other.skipped = Counter()
        return other

    def state_dict(self) -> dict[str, Any]:
        return {
            **asdict(self.place),
            "shape": self.rows.stream.shape(),
            "fingerprint": self._fingerprint,
            "skipped": dict(self.skipped),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        shape = self.rows.stream.shape()
        if list(state["shape"]) != shape:
            raise CheckpointError(
                f"The checkpoint was made on {sum(state['shape'])} rows, and "
                f"{self.rows.stream.name} now has {sum(shape)}. Give the same data, or start anew "
                'with resume="never".'
            )
        self.place = Place(**{name: state[name] for name in asdict(self.place)})
        self._expected = state["fingerprint"]
        self.skipped.clear()
        self.skipped.update(state["skipped"])


class StreamSource:
    """Global batches of streamed rows, endless; this process's share of each.

    Every process reads the whole stream, and takes its block of each batch: which rows can be used
    is known only when they are prepared.

    Args:
        sets: one or more streams; of several, every row comes from one drawn by `weights`, keyed by
            (seed, how many rows came before).
        batch_size: rows per optimizer step, over all processes.
        buffer: rows that are shuffled together.
        seed: of the shuffle.
        processes: rank and size.
        shuffle: False keeps the order of the data.
        mismatched: see `RowSource`.
        weights: of the sets.
        check: called with the rows of each batch; raises for what the loss cannot use.
    """

    at_boundary = True
    total_steps = None
    num_rows = None

    def __init__(
        self,
        sets: Mapping[str, StreamedExamples],
        *,
        batch_size: int,
        buffer: int,
        seed: int,
        processes: Collective,
        shuffle: bool = True,
        mismatched: bool = False,
        weights: Mapping[str, float] | None = None,
        check: Callable[[Examples], None] = lambda examples: None,
    ) -> None:
        self.batch_size = batch_size
        self.processes = processes
        self.mismatched = mismatched
        self.consumed = 0
        self._drawn: Counter[str] = Counter()
        self.cursors = {
            name: Cursor(rows, buffer=buffer, seed=seed, shuffle=shuffle)
            for name, rows in sets.items()
        }
        self._seed = seed
        self._check = check
        total = sum((weights or {}).values())
        self._shares = [weight / total for weight in (weights or {}).values()]

    def facts(self) -> dict[str, Any]:
        """What the report says of the rows so far; of several sets also what came from each."""
        skipped: Counter[str] = Counter()
        for cursor in self.cursors.values():
            skipped.update(cursor.skipped)
        facts = {"used": f"streamed, {self.consumed} so far", "skipped": dict(skipped)}
        return facts | ({"drawn": dict(self._drawn)} if len(self.cursors) > 1 else {})

    def __iter__(self) -> Iterator[Batch]:
        rows = {name: iter(cursor) for name, cursor in self.cursors.items()}
        merge = next(iter(self.cursors.values())).rows.merge
        while True:
            names = [self._name(self.consumed + place) for place in range(self.batch_size)]
            found = [next(rows[name]) for name in names]
            self.consumed += self.batch_size
            self._drawn.update(names)
            examples = merge([(part, place) for _, part, place in found])
            self._check(examples)
            whole = [(epoch, place) for place, (epoch, _, _) in enumerate(found)]
            yield share(examples, whole, self.processes, mismatched=self.mismatched)

    def preview(self, steps: int) -> Iterator[Batch]:
        """What the next `steps` batches hold, over all processes, without moving on."""
        alone = copy.copy(self)
        alone.processes = SimpleNamespace(rank=0, size=1)
        alone.cursors = {name: cursor.fork() for name, cursor in self.cursors.items()}
        alone._drawn = Counter()
        return islice(alone, steps)

    def _name(self, place: int) -> str:
        names = list(self.cursors)
        if len(names) == 1:
            return names[0]
        return names[
            int(generator("mixture", self._seed, place).choice(len(names), p=self._shares))
        ]

    def state_dict(self) -> dict[str, Any]:
        return {
            "consumed": self.consumed,
            "drawn": dict(self._drawn),
            "sets": {name: cursor.state_dict() for name, cursor in self.cursors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state.get("sets", ())) != set(self.cursors):
            raise CheckpointError(
                "The checkpoint was made on other data sets, or on data that was not streamed. "
                'Give the same data and data_options.streaming, or start anew with resume="never".'
            )
        self.consumed = state["consumed"]
        self._drawn = Counter(state["drawn"])
        for name, cursor in self.cursors.items():
            cursor.load_state_dict(state["sets"][name])


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, each made in the background while the one before is used."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="alignkit-rows")
    try:
        made = deque([pool.submit(next, items, None)])
        while (item := made.popleft().result()) is not None:
            made.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
