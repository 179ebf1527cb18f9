"""A reference whose log-likelihoods are kept on disk and shared between runs.

Ahead of training one pass computes what the run will ask for and the disk does not have: without
gradient, many rows at a time, in windows that are sorted by length. The model that trains is the
reference at that moment, so no second one is ever held; and a run that finds all numbers evaluates
none.

Or the numbers are computed when they are first asked for, in the layout of the policy's own
micro-batch: equal weights then give equal bits, and the reference stays in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from alignkit.batches import Batch, Likelihood
from alignkit.errors import DataError
from alignkit.protocols import Backend, Draw, Reference
from alignkit.reference_store import ReferenceStore, Table, as_keys

CHUNK = 512
"""Groups of like length that are put into micro-batches together."""

WINDOW = 32 * CHUNK
"""Groups that are put in the order of length: what a pass holds at a time of data of any size."""

SECONDS = 10.0
"""Between two shards: what a killed pass does again."""


class StoredReference:
    """See the module.

    Args:
        store: where the numbers are.
        at_start: makes the reference that holds as long as nothing has been trained, with what
            splits its batches.
        live: the reference that holds later, too; None: all must be known ahead.
        budget: groups per micro-batch of the pass, or "auto".
    """

    def __init__(
        self,
        store: ReferenceStore,
        *,
        at_start: Callable[[], tuple[Backend, Reference]],
        live: Reference | None,
        budget: int | str = "auto",
    ) -> None:
        self.store = store
        self.at_start = at_start
        self.live = live
        self.budget = budget
        self.table = Table()
        self.computed = 0
        self.runtime: Any = None
        self._upcoming: tuple[Callable[[], Iterable[Batch]], frozenset[str]] | None = None
        self._unsaved: dict[bytes, float] = {}
        self._saved_at = time.monotonic()

    def expect(self, batches: Callable[[], Iterable[Batch]], want: frozenset[str]) -> None:
        """What will be asked for: `prepare` computes what of it is missing."""
        self._upcoming = batches, want

    def prepare(self, runtime: Any) -> None:
        self.runtime = runtime
        # The main process's view counts, also where the others see another disk.
        self.table.add(*runtime.share(self.store.read() if runtime.is_main else None))
        if self.live is not None:
            self.live.prepare(runtime)
        if self._upcoming is not None:
            self._compute_ahead(*self._upcoming)

    # --- ahead of training -----------------------------------------------------------------------

    @torch.no_grad()
    def _compute_ahead(self, upcoming: Callable[[], Iterable[Batch]], want: frozenset[str]) -> None:
        windows = self._missing(upcoming(), want)
        first = next(windows, None)
        if first is None:
            return
        backend, reference = self.at_start()
        reference.prepare(self.runtime)
        with tqdm(total=0, desc="reference", unit="row", disable=not self.runtime.is_main) as bar:
            for groups in chain([first], windows):
                bar.total += len(groups)
                self._compute(groups, backend, reference, want, bar)
        # FSDP2 keeps its root whole after a forward; its optimizer must be given the shards.
        if hasattr(backend.module, "reshard"):
            backend.module.reshard()  # type: ignore[operator]

    def _compute(
        self,
        groups: list[_Group],
        backend: Backend,
        reference: Reference,
        want: frozenset[str],
        bar: Any,
    ) -> None:
        """The numbers of one window, which all processes know afterwards."""
        runtime, done = self.runtime, 0
        own = groups[runtime.rank :: runtime.size]
        # As many everywhere: sharded forwards talk to each other, and so does `_save_together`.
        num = -(-len(groups) // runtime.size)
        for start in range(0, num, CHUNK):
            chunk = own[start : start + CHUNK]
            pieces = backend.split(_batch(chunk or groups[:1]), self.budget)
            self._evaluate(pieces, reference, want)
            step = min(CHUNK * runtime.size, len(groups) - done)
            done += step
            bar.update(step)
            if runtime.max(int(time.monotonic() - self._saved_at > SECONDS)):
                self._save_together()
        self._save_together()

    def _missing(self, batches: Iterable[Batch], want: frozenset[str]) -> Iterator[list[_Group]]:
        """Windows of groups that lack a number, the longest first: what does not fit shows early.

        A window is looked for when those before it are computed. All processes find the same.
        """
        found: list[_Group] = []
        seen: set[tuple[bytes, ...]] = set()
        for whole in batches:
            for batch in (whole, whole.mismatched):
                if batch is None:
                    continue
                keys = _keys(batch, want)
                answers = list(zip(*keys.values(), strict=True))
                lacking = {
                    group
                    for group, own in zip(batch.group.tolist(), answers, strict=True)
                    if own not in seen and any(self.table.get(key) is None for key in own)
                }
                seen |= set(answers)
                found += _groups(batch, sorted(lacking))
            if len(found) >= WINDOW:
                yield sorted(found, key=lambda group: -group.longest)
                found, seen = [], set()
        if found:
            yield sorted(found, key=lambda group: -group.longest)

    def _evaluate(
        self, pieces: Sequence[Batch], reference: Reference, want: frozenset[str]
    ) -> None:
        absent = [pieces[0].select([0]).absent()] * (self.runtime.max(len(pieces)) - len(pieces))
        for piece in [*pieces, *absent]:
            self._remember(piece, reference.log_likelihood(piece, None, want), want)

    def _save_together(self) -> None:
        """What all processes have computed goes to every process, and to the main one's disk."""
        gathered = [self.runtime.gather(torch.from_numpy(part)) for part in self._taken()]
        self._keep(*(part.numpy() for part in gathered), write=self.runtime.is_main)

    # --- in training -----------------------------------------------------------------------------

    def log_likelihood(self, batch: Batch, draw: Draw, want: frozenset[str]) -> Likelihood:
        keys = _keys(batch, want)
        found = {what: [self._known(key) for key in keys[what]] for what in keys}
        lacking = any(value is None for values in found.values() for value in values)
        if self._agreed(lacking):
            if self.live is None:
                raise DataError(
                    "The reference's log-likelihoods were computed ahead, for the rows of `data` "
                    f"and `eval_data`; row {batch.row_id.tolist()} holds an answer that was not "
                    "among them. Write reference=CachedReference(ahead=False), which keeps the "
                    "reference at hand."
                )
            likelihood = self.live.log_likelihood(batch, draw, want)
            self._remember(batch, likelihood, want)
            return likelihood
        numbers = {what: torch.tensor(v, dtype=torch.float32) for what, v in found.items()}
        length = torch.tensor(batch.content.scored_lengths(), dtype=torch.float32)
        return Likelihood(numbers.pop("total"), length, numbers)

    def _agreed(self, lacking: bool) -> bool:
        """Whether any process lacks a number: a sharded forward needs them all."""
        sharded = self.live is not None and self.runtime.sharding != "none"
        return bool(self.runtime.max(int(lacking))) if sharded else lacking

    def _known(self, key: bytes) -> float | None:
        found = self._unsaved.get(key)
        return self.table.get(key) if found is None else found

    def _remember(self, batch: Batch, likelihood: Likelihood, want: frozenset[str]) -> None:
        self.computed += batch.num_answers
        for what, keys in _keys(batch, want).items():
            numbers = likelihood.total if what == "total" else likelihood.extras[what]
            for key, value in zip(keys, numbers.float().tolist(), strict=True):
                self._unsaved[key] = value

    def update(self, step: int) -> None:
        self._keep(*self._taken(), write=True)

    def _taken(self) -> tuple[np.ndarray, np.ndarray]:
        """What was computed since, as arrays."""
        keys, values = list(self._unsaved), list(self._unsaved.values())
        self._unsaved.clear()
        return as_keys(keys).copy(), np.array(values, dtype=np.float32)

    def _keep(self, keys: np.ndarray, values: np.ndarray, *, write: bool) -> None:
        self._saved_at = time.monotonic()
        self.table.add(keys, values)
        # NaN stops this run, which names the row; it may be the machine's fault, and stays here.
        sound = np.isfinite(values)
        if write and sound.any():
            self.store.write(keys[sound], values[sound])

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the disk has it, and a resumed run begins with the same model again."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state, sorted(state)


@dataclass(frozen=True)
class _Group:
    """One group of a batch on its own: its content, and the length of its longest answer."""

    content: Any
    longest: int


def _keys(batch: Batch, want: frozenset[str]) -> dict[str, list[bytes]]:
    group = batch.group.tolist()
    return {what: batch.content.keys(group, what) for what in ("total", *sorted(want))}


def _groups(batch: Batch, places: list[int]) -> list[_Group]:
    lengths = batch.content.lengths()
    members: dict[int, list[int]] = {place: [] for place in places}
    for answer, group in enumerate(batch.group.tolist()):
        if group in members:
            members[group].append(answer)
    return [
        _Group(batch.content.select([place], answers), max(lengths[a] for a in answers))
        for place, answers in members.items()
    ]


def _batch(groups: list[_Group]) -> Batch:
    """The groups as a batch that knows nothing but its content."""
    content = type(groups[0].content).joined([group.content for group in groups])
    sizes = torch.tensor([len(group.content.completions) for group in groups])
    place = torch.arange(len(groups))
    group = torch.repeat_interleave(place, sizes)
    return Batch(content, group, torch.full_like(group, -1), position=place, row_id=place)
