"""FSDP2: torch's `fully_shard`, block by block."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn


def shard(module: nn.Module, device: str, *, reshard_root: bool | None = None) -> nn.Module:
    """The blocks are sharded, and then the whole likelihood module, whose forward is the root.

    `reshard_root`: whether the root is sharded again after its forward; None leaves it to torch,
    which keeps it whole for the backward.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = dist.device_mesh.init_device_mesh(device, (dist.get_world_size(),))
    units: list[nn.Module] = module.shard_units()  # type: ignore[operator]
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard_root)
    if hasattr(module, "within"):
        register_fsdp_forward_method(module, "within")
    return module
