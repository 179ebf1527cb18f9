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
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.text.packing import Group

IMPLEMENTATION = "alignkit_packed"

_ROW: ContextVar[tuple[Group, ...] | None] = ContextVar("packed_row", default=None)


class NotPackable(Exception):
    """A model asks for something that packed rows cannot give it."""


class PackedMask:
    """Who sees whom in a packed row, in the layers of one kind.

    Args:
        groups: the sequences of the row.
        pattern: transformers' mask function of a sequence that stands alone: (batch, head, query
            positions, key positions) -> bool.
        reach: how many positions back it sees; None is all.
    """

    def __init__(
        self, groups: Sequence[Group], pattern: Callable[..., Tensor], reach: int | None
    ) -> None:
        self.groups = groups
        self.pattern = pattern
        longest = max(group.longest for group in groups)
        self.reach = None if reach is not None and reach >= longest else reach
        self._made: dict[tuple[int, int, int], Tensor] = {}

    def between(self, begin: int, length: int, first: int, device: torch.device) -> Tensor:
        """(length, begin + length - first) bool: queries from `begin` on, keys from `first` on."""
        key = (begin, length, first)
        if key not in self._made:
            places = torch.arange(first, begin + length, device=device)
            self._made[key] = self.pattern(0, 0, places[begin - first :, None], places[None])
        return self._made[key]


def packed_mask(
    *_: Any,
    mask_function: Callable[..., Tensor],
    use_vmap: bool = False,
    local_size: int | None = None,
    **__: Any,
) -> PackedMask:
    """What transformers calls to make the mask of one kind of layers."""
    from transformers.masking_utils import causal_mask_function

    groups = _ROW.get()
    assert groups is not None, "a packed attention outside of a packed row"
    if use_vmap or (local_size is None and mask_function is not causal_mask_function):
        raise NotPackable("its layers use a mask of their own beside a causal or sliding one")
    return PackedMask(groups, mask_function, local_size)


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
    if key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = (_repeat(tensor, repeats) for tensor in (key, value))
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
    plain = softcap is None and mask.reach is None and value.shape[-1] == query.shape[-1]
    if plain and query.device.type == "cpu":
        return SharedPrompt.apply(query, key, value, tuple(mask.groups), scale)
    return masked(query, key, value, mask, scale, softcap)


def _repeat(tensor: Tensor, repeats: int) -> Tensor:
    """Grouped-query attention: every key head serves so many query heads."""
    rows, heads, length, size = tensor.shape
    tensor = tensor[:, :, None].expand(rows, heads, repeats, length, size)
    return tensor.reshape(rows, heads * repeats, length, size)


class SharedPrompt(torch.autograd.Function):
    """Softmax attention over [prompt; answer] from its two halves, with torch's CPU flash kernel.

        o = (e^a o_prompt + e^b o_answer) / (e^a + e^b),     a, b the halves' log-sum-exps

    No mask is made, and keys are copied nowhere. All answers of a group meet their prompt in one
    call. The kernel's backward recomputes probabilities from the log-sum-exp that it is given: with
    that of the whole, the gradients of the halves add up to that of the whole.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: tuple[Group, ...], scale: float
    ) -> Tensor:
        rows, heads, length, _ = query.shape
        out = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        lse = query.new_empty(rows, heads, length, dtype=torch.float32)
        held = (query, key, value)
        for group in groups:
            prompt, answers, each = _slices(group)
            out[:, :, prompt], lse[:, :, prompt] = _flash(*_at(held, prompt), True, scale)
            if not group.answers:
                continue
            asked = (query[:, :, answers], *(t[:, :, prompt] for t in (key, value)))
            over_prompt, total = _flash(*asked, False, scale)
            for part in each:
                out[:, :, part], lse[:, :, part] = _flash(*_at(held, part), True, scale)
            own = lse[:, :, answers].clone()
            torch.logaddexp(total, own, out=lse[:, :, answers])
            own = (own - lse[:, :, answers]).exp().unsqueeze(-1).to(out.dtype)
            total = (total - lse[:, :, answers]).exp().unsqueeze(-1).to(out.dtype)
            out[:, :, answers] = out[:, :, answers] * own + over_prompt * total
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.groups, ctx.scale = groups, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse = ctx.saved_tensors
        held = (grad, query, key, value, out, lse)
        grads = tuple(_empty(tensor) for tensor in (query, key, value))
        for group in ctx.groups:
            prompt, answers, each = _slices(group)
            _store(grads, prompt, _flash_backward(*_at(held, prompt), True, ctx.scale))
            if not group.answers:
                continue
            for part in each:
                _store(grads, part, _flash_backward(*_at(held, part), True, ctx.scale))
            asked = (
                *_at((grad, query), answers),
                *_at((key, value), prompt),
                *_at((out, lse), answers),
            )
            of_query, of_key, of_value = _flash_backward(*asked, False, ctx.scale)
            grads[0][:, :, answers] += of_query
            grads[1][:, :, prompt] += of_key
            grads[2][:, :, prompt] += of_value
        return (*grads, None, None)


def _slices(group: Group) -> tuple[slice, slice, list[slice]]:
    """Where the prompt, all answers, and each of them stand."""
    end = group.start + group.prompt
    each, place = [], end
    for length in group.answers:
        if length:
            each.append(slice(place, place + length))
        place += length
    return slice(group.start, end), slice(end, place), each


def _at(tensors: Sequence[Tensor], where: slice) -> list[Tensor]:
    return [tensor[:, :, where] for tensor in tensors]


def _empty(like: Tensor) -> Tensor:
    """Laid out as the projections that the gradient goes back to."""
    rows, heads, length, size = like.shape
    return like.new_empty(rows, length, heads, size).transpose(1, 2)


def _store(grads: Sequence[Tensor], where: slice, found: Sequence[Tensor]) -> None:
    for grad, value in zip(grads, found, strict=True):
        grad[:, :, where] = value


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one block."""
    if not q.shape[2]:
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = kernel(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if not q.shape[2]:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found: tuple[Tensor, Tensor, Tensor] = kernel(grad, q, k, v, out, lse, 0.0, causal, scale=scale)
    return found


def masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: PackedMask,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Sequence by sequence with an explicit mask: any pattern, any device."""
    parts = []
    for group in mask.groups:
        prompt, _, each = _slices(group)
        parts.append(_sequence(query, (key, value), prompt, None, mask, scale, softcap))
        for part in each:
            parts.append(_sequence(query, (key, value), part, prompt, mask, scale, softcap))
    return torch.cat(parts, dim=2)


def _sequence(
    query: Tensor,
    held: tuple[Tensor, Tensor],
    where: slice,
    prompt: slice | None,
    mask: PackedMask,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """The queries of one prompt or answer, over the prompt's keys that it can see and its own."""
    begin = 0 if prompt is None else prompt.stop - prompt.start
    first = 0 if mask.reach is None else min(begin, max(0, begin - mask.reach + 1))
    q = query[:, :, where]
    k, v = (tensor[:, :, where] for tensor in held)
    if prompt is not None and first < begin:
        seen = slice(prompt.start + first, prompt.stop)
        k, v = (torch.cat([t[:, :, seen], own], 2) for t, own in zip(held, (k, v), strict=True))
    allowed = mask.between(begin, where.stop - where.start, first, query.device)
    if softcap is None:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def configs_of(model: nn.Module) -> list[Any]:
    """The configs that a model's modules ask for the name of their attention."""
    found = {id(c): c for m in model.modules() for c in [getattr(m, "config", None)]}
    return [c for c in found.values() if hasattr(c, "_attn_implementation_internal")]


@contextmanager
def packed(configs: Sequence[Any], groups: tuple[Group, ...]) -> Iterator[None]:
    """The models of these configs compute a packed row."""
    _register()
    token = _ROW.set(groups)
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
