"""The frozen comparison, in its several forms.

Every one is a snapshot of the model handed in, taken when training starts; none is ever reloaded
from the model's name. Dropout plays no part: wings evaluate with it off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from alignkit.batches import Batch, Likelihood
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


class AdapterOff(_Stateless):
    """The policy with its adapter switched off: the base model, at no memory of its own.

    Args:
        backend: the policy's backend.
        adapters_off: a context in which the policy computes without its adapter.
    """

    def __init__(
        self, backend: Backend, adapters_off: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.backend = backend
        self.adapters_off = adapters_off

    def log_likelihood(self, batch: Batch, draw: Draw, want: frozenset[str]) -> Likelihood:
        with self.adapters_off():
            return self.backend.module(batch, draw, want)


class FrozenAdapter(_Stateless):
    """The policy with its trained parameters as they were at the start: the reference of a
    continued adapter.

    Switching the adapter off would compare with the base, although the start was the adapter. Only
    the trained tensors are kept twice; they are exchanged for the time of a forward.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.parameters: list[Tensor] = []
        self.snapshot: list[Tensor] = []

    def prepare(self, runtime: Any) -> None:
        # After placement and before the first step, so that sharded parameters give their own
        # shards.
        self.parameters = [p for p in self.backend.module.parameters() if p.requires_grad]
        self.snapshot = [own.clone() for own in self._own()]

    def log_likelihood(self, batch: Batch, draw: Draw, want: frozenset[str]) -> Likelihood:
        with self._exchanged():
            return self.backend.module(batch, draw, want)

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        trained = [own.clone() for own in self._own()]
        self._put(self.snapshot)
        try:
            yield
        finally:
            self._put(trained)

    def _own(self) -> list[Tensor]:
        """The trained tensors, or this process's shards of them."""
        held = [p.detach() for p in self.parameters]
        return [p.to_local() if isinstance(p, DTensor) else p for p in held]

    def _put(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(self._own(), values)
        # FSDP2 keeps its root whole after a forward, and would go on computing with that copy.
        if hasattr(self.backend.module, "reshard"):
            self.backend.module.reshard()  # type: ignore[operator]
