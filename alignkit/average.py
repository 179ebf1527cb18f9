"""A moving average of what is trained, which is evaluated, sampled from and saved in its place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.placed import local, snapshot
from alignkit.runtime import Runtime


class Average:
    """average <- d average + (1 - d) policy after every optimizer step, d = min(decay, (1 + t) /
    (10 + t)) at step t, so that the start is soon forgotten (as diffusers' and TensorFlow's have
    it). In float32, next to the parameters; of a sharded policy each process has its shards.

    Args:
        parameters: what is trained, by name, in float32.
        decay: its limit, in [0, 1).
        modules: they are part of.
        runtime: gathers what is saved.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        decay: float,
        *,
        modules: Iterable[nn.Module],
        runtime: Runtime,
    ) -> None:
        self.parameters = parameters
        self.modules = list(modules)
        self.decay = decay
        self.runtime = runtime
        self.values = {name: snapshot(p) for name, p in parameters.items()}
        self.shown = False

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step`; 1 is the first."""
        assert not self.shown
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(_local(self.values), _local(self.parameters), 1 - decay)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, the policy has the average's weights."""
        before = self.shown
        self.show(True)
        try:
            yield
        finally:
            self.show(before)

    @torch.no_grad()
    def show(self, wanted: bool) -> None:
        """Put the average's weights into the policy, or the trained ones back."""
        if wanted == self.shown:
            return
        for own, kept in zip(_local(self.parameters), _local(self.values), strict=True):
            held = own.clone()
            own.copy_(kept)
            kept.copy_(held)
        for module in self.modules:
            # Roots of sharded modules stay whole after a forward, and would compute with that copy.
            if hasattr(module, "reshard"):
                module.reshard()  # type: ignore[operator]
        self.shown = wanted

    def state_dict(self) -> dict[str, Any]:
        assert not self.shown
        return {name: self.runtime.whole(value) for name, value in self.values.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in self.values.items():
            value.copy_(self.runtime.like(state[name], value))


def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors, or this process's shards of them."""
    return [local(tensor) for tensor in tensors.values()]
