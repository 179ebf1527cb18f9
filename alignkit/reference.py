"""The comparison, in its several forms: frozen, switched, moving, or computed before.

Every one is a snapshot of the model handed in, taken when training starts; none is ever reloaded
from the model's name. Dropout plays no part: wings evaluate with it off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.batches import Batch, Likelihood
from alignkit.errors import DataError
from alignkit.placed import local, snapshot
from alignkit.protocols import Backend, Draw


class _Stateless:
    """A reference that never moves has nothing to save: resuming takes the same snapshot again."""

    def prepare(self, runtime: Any) -> None:
        pass

    def update(self, step: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state, sorted(state)


class NoReference(_Stateless):
    """For losses without a reference: its log-likelihoods are 0."""

    def log_likelihood(self, batch: Batch, draw: Draw, want: frozenset[str]) -> Likelihood:
        zeros = torch.zeros(batch.num_answers)
        return Likelihood(zeros, torch.ones_like(zeros))


class FrozenModel(_Stateless):
    """A model of its own: a copy of the policy as it was handed in, or another model.

    Args:
        module: the likelihood module of the reference; frozen here.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module.requires_grad_(False)

    @classmethod
    def copy_of(cls, module: nn.Module) -> FrozenModel:
        """A copy of the policy's likelihood module, in its dtype. Take it before wrapping."""
        return cls(copy.deepcopy(module))

    def prepare(self, runtime: Any) -> None:
        self.module = runtime.place_frozen(self.module)

    def log_likelihood(self, batch: Batch, draw: Draw, want: frozenset[str]) -> Likelihood:
        return self.module(batch, draw, want)


class SwitchedAdapter(_Stateless):
    """The policy with its adapter switched off, or with a named one on in its place: no memory of
    its own.

    Args:
        backend: the policy's backend.
        switched: a context in which the policy computes as the reference.
    """

    def __init__(
        self, backend: Backend, switched: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.backend = backend
        self.switched = switched

    def log_likelihood(self, batch: Batch, draw: Draw, want: frozenset[str]) -> Likelihood:
        with self.switched():
            return self.backend.module(batch, draw, want)


class FrozenAdapter(_Stateless):
    """The policy with its trained parameters as they were at the start: the reference of a
    continued adapter.

    Switching the adapter off would compare with the base, although the start was the adapter. Only
    the trained tensors are kept twice; they are exchanged for the time of a forward.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.parameters: dict[str, Tensor] = {}
        self.snapshot: dict[str, Tensor] = {}

    def prepare(self, runtime: Any) -> None:
        # After placement and before the first step, so that sharded parameters give their own
        # shards.
        self.parameters = {
            name.removeprefix("module."): parameter
            for name, parameter in self.backend.module.named_parameters()
            if parameter.requires_grad
        }
        self.snapshot = {name: snapshot(p) for name, p in self.parameters.items()}

    def log_likelihood(self, batch: Batch, draw: Draw, want: frozenset[str]) -> Likelihood:
        with self._exchanged():
            return self.backend.module(batch, draw, want)

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        """Swap the values of policy and snapshot, tensor by tensor: no third copy of a model."""
        for own, kept in zip(_local(self.parameters), _local(self.snapshot), strict=True):
            trained = own.clone()
            own.copy_(kept)
            kept.copy_(trained)
        # Roots of sharded modules stay whole after a forward, and would compute with that copy.
        if hasattr(self.backend.module, "reshard"):
            self.backend.module.reshard()  # type: ignore[operator]


def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors, or this process's shards of them."""
    return [local(tensor) for tensor in tensors.values()]


class MovingReference(FrozenAdapter):
    """A copy of the trained parameters that follows the policy.

        every `every` optimizer steps:  reference <- (1 - mix) reference + mix policy

    TR-DPO, Gorbatovski et al. 2024 (2404.09656) Eq. 5 and 6: soft with mix < 1, hard with mix = 1.
    An exponential moving average is every = 1, mix = 1 - decay. With an adapter only its tensors
    are averaged, factor by factor.

    Args:
        backend: the policy's backend.
        every: optimizer steps between two moves.
        mix: share of the policy in a move, in (0, 1].
    """

    def __init__(self, backend: Backend, *, every: int, mix: float) -> None:
        super().__init__(backend)
        self.every = every
        self.mix = mix
        self.runtime: Any = None

    def prepare(self, runtime: Any) -> None:
        super().prepare(runtime)
        self.runtime = runtime

    @torch.no_grad()
    def update(self, step: int) -> None:
        if step % self.every == 0:
            torch._foreach_lerp_(_local(self.snapshot), _local(self.parameters), self.mix)

    def state_dict(self) -> dict[str, Any]:
        return {name: self.runtime.whole(value) for name, value in self.snapshot.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert set(state) == set(self.snapshot), sorted(set(state) ^ set(self.snapshot))
        for name, value in self.snapshot.items():
            value.copy_(self.runtime.like(state[name], value))


class TableReference(_Stateless):
    """Log-likelihoods that were computed before: no model, and no forward.

    Args:
        table: row id -> the reference's log-likelihood of each answer of that row, in the order of
            the row's answers (chosen, then rejected). A pair read as two single answers has two.
    """

    def __init__(self, table: Mapping[int, Sequence[float]]) -> None:
        self.table = table

    def log_likelihood(self, batch: Batch, draw: Draw, want: frozenset[str]) -> Likelihood:
        assert not want, f"a table holds totals only; asked for {sorted(want)}"
        sizes = torch.bincount(batch.group, minlength=batch.num_groups).tolist()
        liked = [None] * batch.num_groups if batch.desirable is None else batch.desirable.tolist()
        values = [
            value
            for row, size, one in zip(batch.row_id.tolist(), sizes, liked, strict=True)
            for value in self._values(row, size, one)
        ]
        total = torch.tensor(values, dtype=torch.float32)
        return Likelihood(total, torch.ones_like(total))

    def _values(self, row: int, size: int, liked: bool | None) -> Sequence[float]:
        values = self.table.get(row)
        if values is not None and size == 1 and len(values) == 2 and liked is not None:
            return values[:1] if liked else values[1:]
        if values is None or len(values) != size:
            found = "nothing" if values is None else f"{len(values)} values"
            raise DataError(
                "A table of reference log-likelihoods has one value per answer of every row; row "
                f"{row} has {size} answers, and the table has {found} for it. Compute the table "
                "from the same data and data_options."
            )
        return values
