"""Devices, processes and sharding: the only place that knows ranks and what wraps a module.

accelerate finds the device and the processes (`accelerate launch`) and wraps modules for data
parallelism; FSDP2 is torch's own `fully_shard`, ZeRO-3 is DeepSpeed's (`zero.py`). Precision is the
wings' affair: their modules run under autocast themselves, so that policy and reference compute
alike.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from alignkit import fsdp, zero
from alignkit.errors import ConfigError
from alignkit.placed import is_zero, local

SHARDED = ("fsdp2", "zero3")


class Runtime:
    """This process's place among the others; also the `Collective` of the floors below.

    Args:
        sharding: "none" replicates what is trained (DDP); "fsdp2" and "zero3" shard it.
        trackers: accelerate's tracker names.
        logging_dir: where file trackers write.
        precision: "fp16" scales gradients, which would underflow without.
    """

    def __init__(
        self,
        *,
        sharding: str = "none",
        precision: str = "fp32",
        trackers: Sequence[str] = (),
        logging_dir: str | None = None,
    ) -> None:
        _refuse_engines()
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        # One bucketed all-reduce per optimizer step; buffers of a frozen-statistics model never
        # move.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        self.accelerator = Accelerator(
            mixed_precision="no",
            log_with=list(trackers) or None,
            project_dir=logging_dir,
            kwargs_handlers=[ddp],
        )
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.size: int = self.accelerator.num_processes
        self.sharding = sharding
        self.scaler: torch.amp.GradScaler | None = None
        if precision == "fp16":
            self.scaler = torch.amp.GradScaler(self.device.type)
        self._host_group: Any = None
        self._engine: zero.Zero3 | None = None
        if sharding in SHARDED and self.size == 1 and not dist.is_initialized():
            raise ConfigError(
                f'trainer.sharding="{sharding}" shards over processes, and there is one. Start '
                "with `accelerate launch --num_processes N` (on CPUs `torchrun --nproc_per_node "
                "N`), or leave sharding out."
            )
        if self.size > 1:
            # Small host numbers travel over gloo, so that they never wait for the device.
            self._host_group = dist.new_group(backend="gloo")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Elementwise sum over processes."""
        if self.size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value, group=self._group(value))
        return value

    def gather(self, value: Tensor) -> Tensor:
        """Concatenation along dim 0 over processes in rank order; lengths may differ."""
        if self.size == 1:
            return value
        lengths: list[Any] = [None] * self.size
        dist.all_gather_object(lengths, len(value), group=self._host_group)
        padded = value.new_zeros((max(lengths), *value.shape[1:]))
        padded[: len(value)] = value
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self._group(value))
        return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])

    def max(self, value: int) -> int:
        """The largest of one host integer per process."""
        if self.size == 1:
            return value
        held = torch.tensor(value)
        dist.all_reduce(held, op=dist.ReduceOp.MAX, group=self._host_group)
        return int(held)

    def share(self, value: Any) -> Any:
        """The main process's value, on every process."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0, group=self._host_group)
        return held[0]

    @torch.no_grad()
    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor to be saved: itself, or all of its shards in the main process's host memory.

        The other processes must call it too and get nothing, so that no device ever holds more than
        one whole tensor of a model that is sharded because it does not fit.
        """
        if is_zero(tensor):
            gathered = zero.gathered(tensor)
        elif isinstance(tensor, DTensor):
            gathered = tensor.full_tensor()
        else:
            return tensor.detach()
        return gathered.cpu() if self.is_main else gathered.new_empty(0)

    def like(self, value: Tensor, target: Tensor) -> Tensor:
        """A tensor that was saved, placed, cast and sharded as `target`."""
        if is_zero(target):
            return zero.shard_like(value, target)
        value = value.to(device=target.device, dtype=target.dtype)
        if isinstance(target, DTensor):
            return distribute_tensor(value, target.device_mesh, target.placements)
        if value.shape == target.shape and value.stride() != target.stride():
            # Fused optimizers read a parameter and its moments in the order of memory.
            return torch.empty_like(target).copy_(value)
        return value

    @torch.no_grad()
    def assign(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Give a parameter a value that was saved."""
        local(parameter).copy_(local(self.like(value, parameter)))

    def renew(self, modules: Iterable[nn.Module]) -> None:
        """After `assign`: nobody computes on with what was gathered before."""
        for module in modules:
            if hasattr(module, "reshard"):
                module.reshard()  # type: ignore[operator]

    def optimizer_state(self, optimizer: Any, parameter: nn.Parameter) -> dict[str, Any]:
        """What an optimizer keeps of a parameter, to be saved; all processes must call it."""
        if isinstance(optimizer, zero.Zero3Optimizer):
            return optimizer.state_of(parameter)
        return {
            key: self.whole(value) if isinstance(value, Tensor) else value
            for key, value in optimizer.state.get(parameter, {}).items()
        }

    def load_optimizer_state(
        self, optimizer: Any, parameter: nn.Parameter, saved: Mapping[str, Any]
    ) -> None:
        if isinstance(optimizer, zero.Zero3Optimizer):
            return optimizer.load_state_of(parameter, saved)
        placed = {key: self._place(value, parameter) for key, value in saved.items()}
        optimizer.state[parameter] = placed

    def _place(self, value: Any, parameter: nn.Parameter) -> Any:
        """An optimizer's tensor as its parameter is placed; its step counter stays whole."""
        if not isinstance(value, Tensor):
            return value
        if value.shape == parameter.shape and value.is_floating_point():
            return self.like(value, parameter.detach()).to(value.dtype)
        return value.to(parameter.device)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self._host_group)

    def _group(self, value: Tensor) -> Any:
        return self._host_group if value.device.type == "cpu" else None

    def engage(
        self, modules: Mapping[str, nn.Module], make: zero.MakeOptimizer
    ) -> tuple[dict[str, nn.Module], Any]:
        """Modules to be trained, wrapped, and the optimizer of what in them requires a gradient."""
        if self.sharding == "zero3":
            if len(modules) > 1:
                raise ConfigError(
                    "trainer.sharding='zero3' trains one module, and here are "
                    f"{', '.join(sorted(modules))}. Write sharding='fsdp2'."
                )
            ((name, module),) = modules.items()
            self._engine = zero.Zero3(module.to(self.device), make)
            return {name: self._engine}, zero.Zero3Optimizer(self._engine)
        found = {name: self.wrap(module) for name, module in modules.items()}
        parameters = (p for module in found.values() for p in module.parameters())
        return found, make([p for p in parameters if p.requires_grad])

    def wrap(self, module: nn.Module) -> nn.Module:
        """A module without its optimizer, replicated or sharded over the processes."""
        if self.sharding == "zero3":
            return zero.Zero3(module.to(self.device))
        if self.sharding == "fsdp2":
            return fsdp.shard(module, self.device.type)
        return self.accelerator.prepare_model(module.to(self.device))

    def place_frozen(self, module: nn.Module) -> nn.Module:
        """A module that is only evaluated: on the device, and sharded where the policy is."""
        if self.sharding == "zero3":
            return zero.Zero3(module.to(self.device))
        if self.sharding == "fsdp2":
            # The root too: without a backward nothing else would ever give its shards back.
            return fsdp.shard(module, self.device.type, reshard_root=True)
        return module.to(self.device)

    @contextmanager
    def last_backward(self, modules: Iterable[nn.Module], last: bool):  # type: ignore[no-untyped-def]
        """Gradients are exchanged in the last backward of an optimizer step only."""
        with ExitStack() as stack:
            for module in modules:
                if isinstance(module, nn.parallel.DistributedDataParallel) and not last:
                    stack.enter_context(module.no_sync())
                elif hasattr(module, "set_requires_gradient_sync"):
                    module.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a summed loss.

        Wrappers average over processes, so it is scaled up.
        """
        loss = loss * self.size
        if self._engine is not None:
            self._engine.backward(loss)
            return
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Scale gradients down to `max_norm`; returns the norm before, a device scalar."""
        if self._engine is not None:
            return zero.clip(parameters, max_norm)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def reset_peak_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> int:
        """Bytes: of the device on CUDA, else the process's largest resident size."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "accelerate's FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""What `accelerate launch` sets -> the engine that it asks for."""


def _refuse_engines() -> None:
    """Engines that own backward and update: losses here are sums that are divided once, over all
    processes, and a coupled loss takes two passes, which they have no place for.
    """
    for variable, engine in _ENGINES.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise ConfigError(
                f"This run was launched with {engine}, which runs backward, clipping and update "
                "itself and scales the loss by its own rules. Launch with --multi_gpu (or "
                "configs/launch/8_gpus.yaml) and write trainer.sharding='fsdp2' or 'zero3', which "
                "shard weights, gradients and optimizer state over all processes."
            )


def pick_precision(wanted: str) -> str:
    """ "auto" is "bf16" on GPUs that have it, else "fp32"; what the device lacks is refused."""
    cuda = torch.cuda.is_available()
    if wanted == "auto":
        return "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    if wanted == "fp16" and not cuda:
        raise ConfigError(
            'trainer.precision="fp16" needs a GPU: its gradients are scaled there. Use "fp32" here.'
        )
    return wanted
