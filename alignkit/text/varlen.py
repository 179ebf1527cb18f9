"""Attention of packed rows by one call of a kernel that takes sequences by their lengths.

Queries are those of the row, each once. Keys are laid out sequence by sequence: a prompt's own, and
for each answer those of its prompt and its own. Such a kernel counts causality and windows from the
lower right, so that an answer's first token sees all of its prompt, or what its window holds of it.

    GPUs only; not run on real hardware
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignkit.text.masks import PackedMask
from alignkit.text.packing import Group, spans

HALF_FROM = (8, 0)
"""Compute capability (Ampere) from which on FlashAttention runs."""


@dataclass(frozen=True)
class Plan:
    """Where the sequences of a row stand.

    Attributes:
        queries, keys: (S + 1,) int32, cumulative lengths; one tensor where they are equal.
        longest: the longest sequence of queries, and of keys.
        places: (K,) where in the row each key stands; None where that is the row itself.
        home: (T,) where among the keys each token of the row stands as itself.
        copies: of each round, (n,) where in the row prompts stand, and (n,) a copy of theirs.
    """

    queries: Tensor
    keys: Tensor
    longest: tuple[int, int]
    places: Tensor | None
    home: Tensor
    copies: tuple[tuple[Tensor, Tensor], ...]


def plan(groups: tuple[Group, ...], device: torch.device) -> Plan:
    """The sequences of a row, on the device by one transfer."""
    queries, keys, places = [0], [0], []
    home: list[np.ndarray] = []
    rounds: list[list[tuple[np.ndarray, np.ndarray]]] = []
    taken = 0
    for group in groups:
        prompt, _, each = spans(group)
        asked = np.arange(prompt.start, prompt.stop)
        for number, part in enumerate((prompt, *each)):
            own = np.arange(part.start, part.stop)
            queries.append(len(own))
            seen = asked if number else own[:0]
            if number:
                rounds += [[]] if len(rounds) < number else []
                rounds[number - 1].append((asked, taken + np.arange(len(asked))))
            home.append(taken + len(seen) + np.arange(len(own)))
            places += [seen, own]
            keys.append(len(seen) + len(own))
            taken += keys[-1]
    pieces = [np.cumsum(queries), np.cumsum(keys), np.concatenate(places), np.concatenate(home)]
    pieces += [np.concatenate(side) for one in rounds for side in zip(*one, strict=True)]
    held = torch.from_numpy(np.concatenate(pieces))
    if device.type == "cuda":
        held = held.pin_memory()
    held = held.to(device, non_blocking=True)
    first, second, where, at, *copies = held.split([len(piece) for piece in pieces])
    cumulative = first.int()
    return Plan(
        queries=cumulative,
        keys=second.int() if rounds else cumulative,
        longest=(max(queries), max(keys)),
        places=where if rounds else None,
        home=at,
        copies=tuple(zip(copies[::2], copies[1::2], strict=True)),
    )


class Spread(torch.autograd.Function):
    """(T, ...) of a row laid out as keys: (K, ...).

    Backward adds up copy by copy, in one order whatever the device.
    """

    @staticmethod
    def forward(ctx: Any, row: Tensor, where: Plan) -> Tensor:
        assert where.places is not None
        ctx.where = where
        return row.index_select(0, where.places)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.index_select(0, ctx.where.home)
        for places, copies in ctx.where.copies:
            total.index_add_(0, places, grad.index_select(0, copies))
        return total, None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: PackedMask,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Causal or sliding attention of every sequence of a packed row: (1, heads, T, size) each."""
    where = mask.made("varlen", lambda: plan(tuple(mask.groups), query.device))
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if where.places is not None:
        key, value = Spread.apply(key, where), Spread.apply(value, where)
    compute = function(softcap)
    assert compute is not None, "a call that was not taken"
    out = compute(query, key, value, where, scale, mask.reach, softcap)
    return out.transpose(0, 1)[None]


Compute = Callable[[Tensor, Tensor, Tensor, Plan, float, int | None, float | None], Tensor]


def by_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    where: Plan,
    scale: float,
    reach: int | None,
    softcap: float | None,
) -> Tensor:
    """`torch.nn.attention.varlen`, which takes FlashAttention or cuDNN."""
    from torch.nn.attention.varlen import varlen_attn

    found: Any = varlen_attn(
        query,
        key,
        value,
        where.queries,
        where.keys,
        *where.longest,
        scale=scale,
        window_size=(-1 if reach is None else reach - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(found, Tensor), "no more was asked for"
    return found


def by_flash_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    where: Plan,
    scale: float,
    reach: int | None,
    softcap: float | None,
) -> Tensor:
    """The flash-attn package, which caps scores, too."""
    from flash_attn import flash_attn_varlen_func

    found: Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        where.queries,
        where.keys,
        *where.longest,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if reach is None else (reach - 1, 0),
        softcap=softcap or 0.0,
    )
    return found


def function(softcap: float | None) -> Compute | None:
    """What computes sequences by their lengths, or None where nothing that is installed does."""
    if softcap is None and _torch_has_it():
        return by_torch
    return by_flash_attn if importlib.util.find_spec("flash_attn") else None


@cache
def _torch_has_it() -> bool:
    """Whether this torch's kernel takes windows and grouped queries."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"window_size", "enable_gqa", "scale"} <= set(inspect.signature(varlen_attn).parameters)


def missing(device: torch.device) -> str | None:
    """Why a device does not have such kernels, or None."""
    if device.type != "cuda":
        return f"it runs on CUDA GPUs and not on {device.type!r}"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < HALF_FROM:
        return f"it needs compute capability 8.0, and this GPU has {'.'.join(map(str, capability))}"
    if function(None) is None:
        return "neither this torch nor the flash-attn package has it"
    return None
