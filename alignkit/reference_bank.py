"""A reference evaluated once on a bank of draws, so that a training step runs the policy alone.

Every row has K draws of timestep and noise, keyed by (seed, row, number); a training step takes one
of them, keyed by (seed, optimizer step, position). The reference's log-likelihoods of all rows on
all draws are found before the first step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from alignkit.batches import Batch, Likelihood
from alignkit.examples import Examples
from alignkit.protocols import Backend, Draw, Reference


class BankedReference:
    """The log-likelihoods of another reference, from a table by row and number of the draw.

    Evaluations have draws of their own, on which that reference is asked itself.

    Args:
        inner: the reference; it must stand still.
        backend: the policy's, whose `banked_draw` makes the draws.
        draws: K.
        seed: of the draws.
        budget: groups per micro-batch while filling.
        rows: read together while filling; with as many as a step has, micro-batches are as large
            as a step's, and kernels round alike.
        keep: whether `inner` is asked again after filling, for evaluations; otherwise it is let go.
    """

    def __init__(
        self,
        inner: Reference,
        backend: Backend,
        *,
        draws: int,
        seed: int,
        budget: int | str,
        rows: int,
        keep: bool,
    ) -> None:
        self.inner: Reference | None = inner
        self.backend: Any = backend
        self.draws = draws
        self.seed = seed
        self.budget = budget
        self.rows = rows
        self.keep = keep
        self.table: dict[int, Tensor] = {}
        self.runtime: Any = None

    def prepare(self, runtime: Any) -> None:
        assert self.inner is not None
        self.runtime = runtime
        self.inner.prepare(runtime)

    @torch.no_grad()
    def fill(self, examples: Examples) -> None:
        """Evaluate the reference on all rows and draws that the table lacks. All processes must
        call it; each does its share.
        """
        if not self.table:
            own = range(self.runtime.rank, len(examples), self.runtime.size)
            found = dict(self._evaluated(examples, own))
            sizes = torch.tensor([found[row].shape[1] for row in found], dtype=torch.int64)
            values = torch.cat([value.T.flatten() for value in found.values()] or [torch.zeros(0)])
            rows = torch.tensor(list(found), dtype=torch.int64)
            gathered = [self.runtime.gather(part) for part in (rows, sizes, values)]
            self._read(*gathered)
        if not self.keep:
            self.inner = None

    def _evaluated(self, examples: Examples, rows: range) -> Iterator[tuple[int, Tensor]]:
        """Row id -> (K, answers) log-likelihoods on the CPU."""
        starts = range(0, len(rows), self.rows)
        for start in tqdm(starts, desc="Reference", leave=False, disable=None):
            some = rows[start : start + self.rows]
            batch = examples.collate(some, [0] * len(some))
            for piece in self.backend.split(batch, self.budget):
                totals = torch.stack([self._totals(piece, k) for k in range(self.draws)])  # (K, N)
                sizes = torch.bincount(piece.group, minlength=piece.num_groups).tolist()
                parts = totals.split(sizes, dim=1)
                yield from zip(piece.row_id.tolist(), parts, strict=True)

    def _totals(self, piece: Batch, number: int) -> Tensor:
        assert self.inner is not None
        draw = self.backend.banked_draw(piece, [number] * piece.num_groups, self.seed)
        return self.inner.log_likelihood(piece, draw, frozenset()).total.float().cpu()

    def log_likelihood(self, batch: Batch, draw: Draw, want: frozenset[str]) -> Likelihood:
        if draw.numbers is None:
            assert self.inner is not None, "kept where there are evaluations"
            return self.inner.log_likelihood(batch, draw, want)
        assert not want, f"a bank holds totals only; asked for {sorted(want)}"
        rows = batch.row_id.tolist()
        total = torch.cat([self.table[r][k] for r, k in zip(rows, draw.numbers, strict=True)])
        return Likelihood(total, torch.ones_like(total))

    def update(self, step: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": torch.tensor(list(self.table), dtype=torch.int64),
            "sizes": torch.tensor([v.shape[1] for v in self.table.values()], dtype=torch.int64),
            "values": torch.cat([value.T.flatten() for value in self.table.values()]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._read(state["rows"], state["sizes"], state["values"])

    def _read(self, rows: Tensor, sizes: Tensor, values: Tensor) -> None:
        parts = values.split((self.draws * sizes).tolist())
        self.table = {
            row: part.view(-1, self.draws).T
            for row, part in sorted(
                zip(rows.tolist(), parts, strict=True), key=lambda pair: pair[0]
            )
        }
