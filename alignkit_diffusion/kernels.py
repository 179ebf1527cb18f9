"""One kernel for policy and reference, so that equal weights give equal bits."""

from __future__ import annotations

from typing import Any, Self

from torch import nn
from torch.utils.hooks import RemovableHandle


class Folding:
    """Gives the first linear layer of every transformer a contiguous input, from now to `end`.

    That input is a transposed view. torch multiplies such a view in one of two ways, and takes one
    or the other by whether the weight requires a gradient; the weights of a frozen copy do not, nor
    do the casts that autocast makes without gradient. The two differ in their last bits, which beta
    makes visible. A contiguous input leaves no choice.

    Args:
        unet: a UNet, after an adapter has been put on it.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        self.handles: list[RemovableHandle] = []
        self.begin()

    def begin(self) -> None:
        """Take effect (again)."""
        from diffusers.models.transformers.transformer_2d import Transformer2DModel

        if self.handles:
            return
        transformers = [m for m in self.unet.modules() if isinstance(m, Transformer2DModel)]
        # The older layout projects by a convolution, before transposing.
        linear = [m.proj_in for m in transformers if m.use_linear_projection]
        self.handles = [layer.register_forward_pre_hook(_contiguous) for layer in linear]

    def end(self) -> None:
        """Leave the UNet as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def _contiguous(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].contiguous(), *inputs[1:])
