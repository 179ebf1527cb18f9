"""A UNet in the caller's hands: how it came, so that it can be given back like that."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """Everything of a UNet that a run changes, apart from its weights.

    Attributes:
        device: where it is.
        dtypes: each parameter's.
        flags: whether each parameter requires a gradient.
        modes: whether each module is in training mode.
    """

    device: torch.device
    dtypes: dict[nn.Parameter, torch.dtype]
    flags: dict[nn.Parameter, bool]
    modes: dict[nn.Module, bool]

    @classmethod
    def of(cls, unet: nn.Module) -> State:
        """As it is now."""
        parameters = list(unet.parameters())
        return cls(
            parameters[0].device,
            {p: p.dtype for p in parameters},
            {p: p.requires_grad for p in parameters},
            {module: module.training for module in unet.modules()},
        )

    def restore(self, unet: nn.Module) -> None:
        """Bring back all but the dtypes."""
        for module, training in self.modes.items():
            module.training = training
        for module in unet.modules():
            base = getattr(module, "base_layer", None)
            if isinstance(base, nn.Module) and module not in self.modes:
                module.train(base.training)  # an adapter that came since goes with its layer
        for parameter, flag in self.flags.items():
            parameter.requires_grad_(flag)
        nn.Module.to(unet, self.device)


class Borrowed:
    """A UNet of the caller's, from before anything is done to it.

    Args:
        unet: theirs.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        self.before = State.of(unet)
        self._working: State | None = None
        self._masters: dict[nn.Parameter, Tensor] = {}
        self._told = False

    def give_back(self) -> None:
        """Modes, flags, dtypes and device as they were; what was added since stays."""
        if self._working is not None:
            return
        self._working = State.of(self.unet)
        for parameter, dtype in self.before.dtypes.items():
            if parameter.dtype != dtype:
                if parameter.requires_grad:
                    self._masters[parameter] = parameter.data
                    parameter.grad = None
                parameter.data = parameter.data.to(dtype)
        self.before.restore(self.unet)
        if self._masters and not self._told:
            self._told = True
            came = str(next(iter(self.before.dtypes.values()))).removeprefix("torch.")
            logger.warning(
                "The UNet came in %s and goes back in it: its trained float32 weights are rounded. "
                "The run folder holds them unrounded; or give the pipeline in float32.",
                came,
            )

    def take_again(self) -> None:
        """As it was while training, to the last bit."""
        if self._working is None:
            return
        nn.Module.to(self.unet, self._working.device)
        for parameter, dtype in self._working.dtypes.items():
            if parameter.dtype != dtype:
                parameter.data = self._masters.get(parameter, parameter.data.to(dtype))
        self._working.restore(self.unet)
        self._working, self._masters = None, {}


@contextmanager
def evaluating(unet: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the UNet is on `device` in evaluation mode; afterwards as it was."""
    before = State.of(unet)
    try:
        nn.Module.to(unet.eval(), device)
        yield
    finally:
        before.restore(unet)
