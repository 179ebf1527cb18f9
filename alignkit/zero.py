"""DeepSpeed's ZeRO stage 3: weights, gradients and optimizer state sharded over the processes.

The engine shards, gathers and updates, and decides nothing. Losses come to it divided; gradients
are measured and clipped on their shards before its step; weights and moments are saved whole, in
the checkpoints of every other run. What lies outside the repeated blocks (embeddings, last norm,
head) is kept whole between updates: a head that works in chunks is called more often on one process
than on another, and whoever gathers must be met by all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alignkit.placed import is_zero, local, whole_shape

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,  # how many rows there are is not the engine's affair
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "steps_per_print": None,
    "zero_optimization": {"stage": 3, "reduce_bucket_size": 2**26},
}
"""In float32, as what is trained is kept; where bf16 is asked for, a wing computes in it."""


class Zero3(nn.Module):
    """A likelihood module whose parameters are sharded; its forward is the module's.

    Args:
        module: on this process's device.
        make: the optimizer of parameters that require a gradient; None where nothing is trained.
    """

    def __init__(self, module: nn.Module, make: MakeOptimizer | None = None) -> None:
        super().__init__()
        self.module = module
        # Made before there are shards: it tells matrices from vectors.
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = None if make is None else make(trained)
        units: list[nn.Module] = module.shard_units()  # type: ignore[operator]
        inside = {id(part) for unit in units for part in unit.modules()}
        sharded = {id(p) for unit in units for p in unit.parameters()}
        self._outside = [p for p in module.parameters() if id(p) not in sharded]
        engine = _initialized(_Traversable(module), inside, optimizer)
        self._held = (engine,)  # it is a module, too, and no part of this one
        self.gather()

    @property
    def engine(self) -> Any:
        return self._held[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kind, found = self.engine(*args, **kwargs)
        return found if kind is None else kind(**found)

    def gather(self) -> None:
        """Make whole what stays so until the next update."""
        for dtype in {p.dtype: None for p in self._outside}:
            alike: list[Any] = [p for p in self._outside if p.dtype == dtype]
            alike[0].all_gather(alike)

    def reshard(self) -> None:
        """Forget what was gathered: shards have been given other values."""
        self.engine.optimizer.empty_partition_cache()
        if hasattr(self.engine.optimizer, "refresh_fp32_params"):
            self.engine.optimizer.refresh_fp32_params()
        self.gather()

    def set_requires_gradient_sync(self, last: bool) -> None:
        """Stage 3 adds to its shards in every backward; the last one ends the accumulation."""
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)


class _Traversable(nn.Module):
    """The engine finds the tensors of tuples and mappings, and a likelihood is neither."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> tuple[type | None, Any]:
        found = self.module(*args, **kwargs)
        if is_dataclass(found) and not isinstance(found, type):
            return type(found), dict(vars(found))
        return None, found


def _initialized(
    module: nn.Module, inside: set[int], optimizer: torch.optim.Optimizer | None
) -> Any:
    """The engine, which gathers for the modules `inside` and lets the others alone."""
    import deepspeed

    outside = [part for part in module.modules() if part is not module and id(part) not in inside]
    hooks = [dict(kind) for part in outside for kind in _hooks(part)]
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=CONFIG)
    for held, before in zip((k for part in outside for k in _hooks(part)), hooks, strict=True):
        for key in [key for key in held if key not in before]:
            del held[key]
    return engine


def _hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return module._forward_pre_hooks, module._forward_hooks


class Zero3Optimizer:
    """The engine's optimizer, as the trainer uses one."""

    def __init__(self, module: Zero3) -> None:
        self.module = module

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.module.engine.optimizer.param_groups

    def step(self) -> None:
        self.module.engine.step()
        self.module.gather()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.module.engine.optimizer.zero_grad(set_to_none)
        for parameter in self.module.module.parameters():
            if parameter.requires_grad:
                # Else one that the next step does not reach would keep this step's gradient.
                gradient_of(parameter).zero_()

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """What is kept of a parameter, whole; all processes must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[str, Any] = next(iter(self._states.values()), {})
        return {
            key: value if value.ndim == 0 else safe_get_full_optimizer_state(parameter, key)
            for key, value in state.items()
        }

    def load_state_of(self, parameter: nn.Parameter, saved: Mapping[str, Any]) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        for flat in self.module.engine.optimizer.fp32_partitioned_groups_flat:
            state = self._states[flat]
            for key, value in saved.items():
                if value.ndim == 0:
                    state[key] = value.to(flat.device, copy=True)  # each counts on its own
                elif key not in state:
                    state[key] = torch.zeros_like(flat)
        for key, value in saved.items():
            if value.ndim:
                safe_set_local_optimizer_state(parameter, shard_like(value, parameter), key)

    @property
    def _states(self) -> Any:
        """Of the flat pieces that the shards of many parameters make up."""
        return self.module.engine.optimizer.optimizer.state


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """This process's part of a gradient, summed over micro-batches and averaged over processes."""
    from deepspeed.utils import safe_get_local_grad

    return safe_get_local_grad(parameter)


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to `max_norm`; returns the norm before.

    As `torch.nn.utils.clip_grad_norm_`, on shards.
    """
    gradients = [gradient_of(p) for p in parameters]
    square = torch.nn.utils.get_total_norm(gradients).square()
    dist.all_reduce(square)
    norm = square.sqrt()
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a parameter or of a snapshot; all processes must call it."""
    assert is_zero(tensor)
    shard, shape = local(tensor).contiguous(), whole_shape(tensor)
    flat = shard.new_empty(shard.numel() * dist.get_world_size())
    dist.all_gather_into_tensor(flat, shard)
    return flat[: shape.numel()].view(shape)


def shard_like(value: Tensor, target: Tensor) -> Tensor:
    """This process's part of a whole tensor, cut and padded as `target` is."""
    held = local(target)
    start = held.numel() * dist.get_rank()
    part = value.flatten()[start : start + held.numel()]
    padded = torch.zeros_like(held)
    padded.view(-1)[: part.numel()] = part.to(held)
    return padded
