"""What computes attention over packed rows: a table of kernels, and a trial of each at start.

    cpu          torch's flash kernel for CPUs: causal rows on CPUs
    varlen       FlashAttention or cuDNN by lengths of sequences: half precision on GPUs
    flex         flex attention with a mask by blocks: any row on GPUs
    sequences    torch's `scaled_dot_product_attention`, sequence by sequence: anything anywhere

A row is computed by a few of them in order: by the first that takes a layer's call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignkit.text import flex, varlen
from alignkit.text.flash import SharedPrompt
from alignkit.text.masks import PackedMask, masked, repeated


@dataclass(frozen=True)
class Call:
    """One layer's attention over a packed row, without its numbers.

    Attributes:
        heads: of queries, and of keys and values.
        sizes: of a query's and of a value's head.
    """

    mask: PackedMask
    heads: tuple[int, int]
    sizes: tuple[int, int]
    scale: float
    softcap: float | None
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        asked = [f"{self.dtype} heads of {self.sizes[0]}".removeprefix("torch.")]
        asked += [] if self.mask.reach is None else [f"that see {self.mask.reach} tokens"]
        asked += [] if self.softcap is None else ["with soft-capped scores"]
        return " ".join(asked)


Run = Callable[[Tensor, Tensor, Tensor, Call], Tensor]


@dataclass(frozen=True)
class Kernel:
    """One way to compute packed rows.

    Attributes:
        takes: whether it can compute a call.
        run: (queries, keys, values, call) -> outputs; all are (1, heads, T, size), keys and
            values with heads of their own.
        missing: why a device does not have it, or None.
    """

    takes: Callable[[Call], bool]
    run: Run
    missing: Callable[[torch.device], str | None] = lambda device: None


def _cpu_takes(call: Call) -> bool:
    plain = call.softcap is None and call.mask.reach is None and call.sizes[0] == call.sizes[1]
    return plain and call.device.type == "cpu"


def _cpu(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    key, value = repeated(query, key), repeated(query, value)
    found: Tensor = SharedPrompt.apply(query, key, value, tuple(call.mask.groups), call.scale)
    return found


def _varlen_takes(call: Call) -> bool:
    half = call.dtype in (torch.float16, torch.bfloat16)
    known = call.mask.reach is None or call.mask.slides
    size, other = call.sizes
    fits = size == other <= 256 and size % 8 == 0
    return half and known and fits and varlen.function(call.softcap) is not None


def _varlen(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    return varlen.attend(query, key, value, call.mask, call.scale, call.softcap)


def _flex(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    return flex.attend(query, key, value, call.mask, call.scale, call.softcap)


def _sequences(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    return masked(query, key, value, call.mask, call.scale, call.softcap)


KERNELS: Mapping[str, Kernel] = {
    "cpu": Kernel(_cpu_takes, _cpu),
    "varlen": Kernel(_varlen_takes, _varlen, varlen.missing),
    "flex": Kernel(lambda call: True, _flex, flex.missing),
    "sequences": Kernel(lambda call: True, _sequences),
}
PLAIN = ("cpu", "sequences")
"""They take any call on any device."""
FAST = ("varlen", "flex")
"""What is tried in this order where there is a GPU."""


def chosen(attention: str, calls: Sequence[Call]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The kernels for a model's layers, and why others that were wanted do not serve.

    Args:
        attention: `TextOptions.attention`; a kernel asked for by name must take all calls.
        calls: the layers' attention over a row of the trial, in the dtype of the training.
    """
    if attention == "plain":
        return PLAIN, {}
    there = [name for name in FAST if KERNELS[name].missing(calls[0].device) is None]
    left = list({(str(c), c.heads, c.sizes, c.scale): c for c in calls}.values())
    passed: list[str] = []
    refused: dict[str, str] = {}
    for name in there if attention == "auto" else (attention,):
        taken = [call for call in left if KERNELS[name].takes(call)]
        others = [call for call in left if call not in taken]
        reason = _refusal(name, taken, others if attention != "auto" or not taken else [])
        if reason is not None:
            refused[name] = reason
            continue
        passed.append(name)
        left = others
        if not left:
            break
    return (*passed, *(PLAIN if attention == "auto" else ())), refused


def _refusal(name: str, taken: Sequence[Call], others: Sequence[Call]) -> str | None:
    """Why a kernel does not serve for calls: it is missing, cannot, fails or is wrong."""
    kernel = KERNELS[name]
    reason = kernel.missing((*taken, *others)[0].device)
    if reason is not None:
        return reason
    if others:
        return f"it does not compute {others[0]}"
    found = (_trial(kernel.run, call) for call in taken)
    return next((reason for reason in found if reason is not None), None)


def _trial(run: Run, call: Call) -> str | None:
    """Why a kernel does not give what torch's own attention gives, with gradients, or None."""
    draw = torch.Generator().manual_seed(0)
    length = max(g.start + g.prompt + sum(g.answers) for g in call.mask.groups)
    sides = (
        (call.heads[0], call.sizes[0]),
        (call.heads[1], call.sizes[0]),
        (call.heads[1], call.sizes[1]),
    )
    given = [
        torch.randn(1, heads, length, size, generator=draw).to(call.device, call.dtype)
        for heads, size in sides
    ]
    try:
        found = _with_gradients(run, given, call)
    except Exception as error:
        return f"it fails on {call} ({type(error).__name__}: {error})"
    expected = _with_gradients(_sequences, [tensor.float() for tensor in given], call)
    gaps = [float((f.float() - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)]
    if max(gaps) <= _rounding(call.dtype):
        return None
    return f"it is off by {max(gaps):.1e} of the norm on {call}"


def _rounding(dtype: torch.dtype) -> float:
    """What a kernel's own arithmetic may make of outputs and gradients, over their norm."""
    coarse = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return 4 * torch.finfo(torch.bfloat16 if coarse else dtype).eps + 1e-5


@torch.enable_grad()
def _with_gradients(run: Run, given: Sequence[Tensor], call: Call) -> tuple[Tensor, ...]:
    tensors = [tensor.detach().requires_grad_() for tensor in given]
    query, key, value = tensors
    out = run(query, key, value, replace(call, dtype=query.dtype))
    slope = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, tensors, slope)
