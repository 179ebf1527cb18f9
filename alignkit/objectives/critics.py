"""What values the states of an answer: a model of its own, or a head on the policy's trunk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from alignkit.batches import Batch, Likelihood
from alignkit.protocols import Backend


class Critic(Protocol):
    """Values of states.

    Attributes:
        of_policy: extras that it wants of the policy's own forward.
        weight: of its loss.
        warmup: optimizer steps in which it alone learns.
    """

    of_policy: frozenset[str]
    weight: float
    warmup: int

    def modules(self) -> dict[str, nn.Module]:
        """What it trains beside the policy."""
        ...

    def replace(self, module: nn.Module) -> None: ...

    def warm(self, alone: bool) -> None:
        """Called before a step's forwards: whether only the critic is to learn from them."""
        ...

    def values(self, batch: Batch, policy: Likelihood) -> Tensor:
        """(N, T), with graph."""
        ...

    def look(
        self, batch: Batch, policy: Likelihood, backend: Backend, ends: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(N, T) values, and (N,) of the states after the last tokens where they are asked for."""
        ...


class OwnCritic:
    """A model of its own.

    Args:
        backend: evaluates it; its `total` is the value after the last token.
        weight: of its loss.
        warmup: optimizer steps in which it alone learns.
    """

    of_policy: frozenset[str] = frozenset()

    def __init__(self, backend: Backend, *, weight: float, warmup: int) -> None:
        self.backend = backend
        self.weight = weight
        self.warmup = warmup

    def modules(self) -> dict[str, nn.Module]:
        return {"critic": self.backend.module}

    def replace(self, module: nn.Module) -> None:
        self.backend.module = module

    def _found(self, batch: Batch) -> Likelihood:
        found: Likelihood = self.backend.module(batch, None, frozenset({"values"}))
        return found

    def warm(self, alone: bool) -> None:
        """Its gradient never reaches the policy."""

    def values(self, batch: Batch, policy: Likelihood) -> Tensor:
        return self._found(batch).extras["values"]

    def look(
        self, batch: Batch, policy: Likelihood, backend: Backend, ends: bool
    ) -> tuple[Tensor, Tensor | None]:
        found = self._found(batch)
        return found.extras["values"], found.total if ends else None


class SharedCritic:
    """A head on the policy's trunk: no model and no forward of its own.

    Args:
        head: it; `apart` keeps its gradient from the trunk.
        weight: of its loss.
        warmup: optimizer steps in which it alone learns.
    """

    of_policy: frozenset[str] = frozenset({"values"})

    def __init__(self, head: Any, *, weight: float, warmup: int) -> None:
        self.head = head
        self.weight = weight
        self.warmup = warmup

    def modules(self) -> dict[str, nn.Module]:
        return {}

    def replace(self, module: nn.Module) -> None:
        raise AssertionError("the policy's module holds the head")

    def warm(self, alone: bool) -> None:
        self.head.apart = alone

    def values(self, batch: Batch, policy: Likelihood) -> Tensor:
        return policy.extras["values"]

    def look(
        self, batch: Batch, policy: Likelihood, backend: Backend, ends: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The state after the last token is the one before a token more, whichever that is."""
        values = policy.extras["values"]
        if not ends:
            return values, None
        longer = replace(batch, content=batch.content.lengthened())
        found = backend.module(longer, None, self.of_policy).extras["values"]
        last = torch.tensor(batch.content.scored_lengths(), device=found.device)
        return values, found.gather(1, last[:, None]).squeeze(1)
