"""A mode in which whatever would make the host wait for the device raises."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default: "a value read by the host (.item(), bool(), an if)",
    aten.nonzero.default: "a shape that depends on values (boolean index, nonzero)",
    aten.masked_select.default: "a shape that depends on values (masked_select)",
    aten.equal.default: "a comparison read by the host",
    aten.is_nonzero.default: "a value read by the host",
}


class NoSync(TorchDispatchMode):
    """Raises on the operators that would stop the host until the device has caught up."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            raise AssertionError(f"{func}: {WAITS[func]}")
        if func is aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            raise AssertionError(f"{func}: a shape that depends on values (boolean index)")
        return func(*args, **(kwargs or {}))
