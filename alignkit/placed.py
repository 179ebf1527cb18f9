"""Parameters of which a process holds a shard: FSDP2's are DTensors; those of DeepSpeed's ZeRO-3
keep theirs beside a storage that is empty while nobody computes with it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in memory that both share; all of a whole one."""
    if isinstance(tensor, DTensor):
        return tensor.to_local().detach()
    return getattr(tensor, "ds_tensor", tensor).detach()


def snapshot(parameter: Tensor) -> Tensor:
    """A copy of what this process holds, which `local` and the runtime treat like the parameter."""
    if isinstance(parameter, DTensor):
        return parameter.detach().clone()
    kept: Any = local(parameter).clone()
    if is_zero(parameter):
        kept.ds_shape = whole_shape(parameter)
    return kept


def is_zero(tensor: Tensor) -> bool:
    """Whether it is ZeRO-3's: a parameter, or a snapshot of one."""
    return hasattr(tensor, "ds_shape")


def whole_shape(tensor: Tensor) -> torch.Size:
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def size_of(tensor: Tensor) -> int:
    """Elements of the whole."""
    return math.prod(whole_shape(tensor))
