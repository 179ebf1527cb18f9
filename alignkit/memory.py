"""Where weights lie in memory."""

from __future__ import annotations

from torch import nn


def align_memory(module: nn.Module) -> None:
    """Move weights that a file was mapped to onto 64-byte boundaries.

    Some CPU kernels sum in another order off them, and then a copy of the model, which is always on
    them, differs from it in the last bit.
    """
    for parameter in module.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()
