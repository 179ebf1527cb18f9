"""Attention over a packed row: each sequence sees itself alone, answers see their prompt as well.

    prompt    causal over itself
    answer    over [prompt; itself], from the prompt's end on

It is an attention implementation of transformers under a name of its own, and stands in a model's
config only while a packed row is computed. `AttentionMaskInterface` says which pattern a layer
wants (causal, sliding window, chunked); what comes out is handed to the layers in the mask's place,
so that a layer that is recomputed in backward finds it again. Work grows with the sum of the
sequences' own squares, not with the square of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.text.kernels import KERNELS, PLAIN, Call
from alignkit.text.masks import PackedMask
from alignkit.text.packing import Group

IMPLEMENTATION = "alignkit_packed"


@dataclass(frozen=True)
class Row:
    """The packed row that is computed at the moment.

    Attributes:
        groups: its sequences.
        kernels: names of what computes it: the first that takes a layer's call.
        calls: where each layer's attention is noted, if anybody asks.
    """

    groups: tuple[Group, ...]
    kernels: tuple[str, ...] = PLAIN
    calls: list[Call] | None = None


_ROW: ContextVar[Row | None] = ContextVar("packed_row", default=None)


class NotPackable(Exception):
    """A model asks for something that packed rows cannot give it."""


def packed_mask(
    *_: Any,
    mask_function: Callable[..., Tensor],
    use_vmap: bool = False,
    local_size: int | None = None,
    **__: Any,
) -> PackedMask:
    """What transformers calls to make the mask of one kind of layers."""
    from transformers.masking_utils import causal_mask_function

    row = _ROW.get()
    assert row is not None, "a packed attention outside of a packed row"
    if use_vmap or (local_size is None and mask_function is not causal_mask_function):
        raise NotPackable("its layers use a mask of their own beside a causal or sliding one")
    return PackedMask(row.groups, mask_function, local_size, row.kernels, row.calls)


_HARMLESS = frozenset({"position_ids", "cache_position", "attention_mask"})


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer; tensors are (1, heads, T, size)."""
    if not isinstance(attention_mask, PackedMask):
        raise NotPackable("its layers make their masks themselves")
    strange = [n for n, v in more.items() if isinstance(v, Tensor) and n not in _HARMLESS]
    if strange or more.get("is_causal") is False:
        raise NotPackable(f"its attention takes {strange or ['is_causal=False']}")
    assert dropout == 0, "the model is evaluated without dropout"
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _attend(query, key, value, attention_mask, scale, softcap)
    return out.transpose(1, 2), None


@torch.compiler.disable
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: PackedMask,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Out of reach of the compiler, which would compile anew for every row of other lengths."""
    heads, sizes = (query.shape[1], key.shape[1]), (query.shape[-1], value.shape[-1])
    call = Call(mask, heads, sizes, scale, softcap, query.dtype, query.device)
    if mask.calls is not None:
        mask.calls.append(call)
    for name in mask.kernels:
        if KERNELS[name].takes(call):
            return KERNELS[name].run(query, key, value, call)
    raise NotPackable(f"{' and '.join(mask.kernels)} attention does not compute {call}")


def configs_of(model: nn.Module) -> list[Any]:
    """The configs that a model's modules ask for the name of their attention."""
    found = {id(c): c for m in model.modules() for c in [getattr(m, "config", None)]}
    return [c for c in found.values() if hasattr(c, "_attn_implementation_internal")]


@contextmanager
def packed(configs: Sequence[Any], row: Row) -> Iterator[None]:
    """The models of these configs compute a packed row."""
    _register()
    token = _ROW.set(row)
    try:
        with _named(configs, IMPLEMENTATION):
            yield
    finally:
        _ROW.reset(token)


def as_computed(configs: Sequence[Any]) -> tuple[AbstractContextManager[None], ...]:
    """For checkpointing: contexts of a block's forward, and of its recomputation in backward."""
    return nullcontext(), _named(configs, configs[0]._attn_implementation_internal)


@contextmanager
def _named(configs: Sequence[Any], name: str) -> Iterator[None]:
    """Configs that name another attention. They are the caller's, and as they were afterwards."""
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, kept in zip(configs, before, strict=True):
            config._attn_implementation_internal = kept


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    if IMPLEMENTATION not in AttentionInterface._global_mapping:
        AttentionInterface.register(IMPLEMENTATION, packed_attention)
        AttentionMaskInterface.register(IMPLEMENTATION, packed_mask)
