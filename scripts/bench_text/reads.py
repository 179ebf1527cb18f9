"""Counting what makes the host wait for the device, on a machine without one, too.

Every tensor that descends from the model's parameters, or was sent to a device, counts as one
there. The operators that read such a tensor's values are counted where they are dispatched, and its
copies to the host where Python asks for them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
}
COPIES = ("tolist", "numpy", "cpu")
"""What copies to the host without a dispatched operator, where the device is the CPU."""


def on_device(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu" or getattr(tensor, "as_on_device", False)


def mark(tensor: Tensor) -> Tensor:
    tensor.as_on_device = True  # type: ignore[attr-defined]
    if (
        tensor._is_view() and tensor._base is not None
    ):  # what was written into a part is in the whole
        tensor._base.as_on_device = True  # type: ignore[attr-defined]
    return tensor


class Reads(TorchDispatchMode):
    """Counts device reads in `found`, name -> how many; use as a context."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._originals: dict[str, Any] = {}
        for parameter in model.parameters():
            mark(parameter)

    def __enter__(self) -> Reads:
        for name in COPIES:
            self._originals[name] = getattr(Tensor, name)
            setattr(Tensor, name, self._counted(name, self._originals[name]))
        self._originals["to"] = Tensor.to
        Tensor.to = self._sent(Tensor.to)  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, original in self._originals.items():
            setattr(Tensor, name, original)

    def _counted(self, name: str, original: Any) -> Any:
        def counting(tensor: Tensor, *given: Any, **named: Any) -> Any:
            self.found[name] += on_device(tensor)
            return original(tensor, *given, **named)

        return counting

    @staticmethod
    def _sent(original: Any) -> Any:
        """`Tensor.to` with a device: a new tensor there, also where host and device are one."""

        def sending(tensor: Tensor, *given: Any, **named: Any) -> Any:
            out = original(tensor, *given, **named)
            somewhere = [*given, *named.values()]
            if not any(isinstance(one, (str, torch.device)) for one in somewhere):
                return out
            out = aten.alias(out) if out is tensor else out
            out.as_on_device = True
            return out

        return sending

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(on_device(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)):
            waits = func in WAITS or _by_mask(func, args)
            self.found[str(func)] += waits
            for made in tree_leaves(out):
                if isinstance(made, Tensor):
                    mark(made)
        return out


def _by_mask(func: Any, args: Any) -> bool:
    """An index by a mask, whose number of True decides a shape."""
    if func is not aten.index.Tensor:
        return False
    return any(index is not None and index.dtype == torch.bool for index in args[1])
