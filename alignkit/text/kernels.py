"""The arithmetic of attention in packed rows: who sees whom, and two ways to compute it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.text.packing import Group


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


class SharedPrompt(torch.autograd.Function):
    """Softmax attention over [prompt; answer] from its two halves, with torch's CPU flash kernel.

        o = (e^a o_prompt + e^b o_answer) / (e^a + e^b),     a, b the halves' log-sum-exps

    No mask is made, and keys are copied nowhere. All answers of a group meet their prompt in one
    call. The kernel's backward recomputes probabilities from the log-sum-exp that it is given: with
    that of the whole, the gradients of the halves add up to that of the whole.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: tuple[Group, ...], scale: float
    ) -> Tensor:
        rows, heads, length, _ = query.shape
        out = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        lse = query.new_empty(rows, heads, length, dtype=torch.float32)
        held = (query, key, value)
        for group in groups:
            prompt, answers, each = _slices(group)
            out[:, :, prompt], lse[:, :, prompt] = _flash(_at(held, prompt), True, scale)
            if not group.answers:
                continue
            asked = (query[:, :, answers], *(t[:, :, prompt] for t in (key, value)))
            over_prompt, total = _flash(asked, False, scale)
            for part in each:
                out[:, :, part], lse[:, :, part] = _flash(_at(held, part), True, scale)
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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        held = (grad, query, key, value, out, lse)
        grads = tuple(_empty(tensor) for tensor in (query, key, value))
        for group in ctx.groups:
            prompt, answers, each = _slices(group)
            _store(grads, prompt, _flash_backward(_at(held, prompt), True, ctx.scale))
            if not group.answers:
                continue
            for part in each:
                _store(grads, part, _flash_backward(_at(held, part), True, ctx.scale))
            asked = (
                *_at((grad, query), answers),
                *_at((key, value), prompt),
                *_at((out, lse), answers),
            )
            of_query, of_key, of_value = _flash_backward(asked, False, ctx.scale)
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


def _flash(block: Sequence[Tensor], causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one block of queries, keys and values."""
    query = block[0]
    if not query.shape[2]:
        return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = kernel(*block, 0.0, causal, scale=scale)
    return out, lse


def _flash_backward(block: Sequence[Tensor], causal: bool, scale: float) -> Sequence[Tensor]:
    """Gradients of queries, keys and values; of a block's gradient, them, output, log-sum-exp."""
    if not block[1].shape[2]:
        return [torch.zeros_like(tensor) for tensor in block[1:4]]
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found: Sequence[Tensor] = kernel(*block, 0.0, causal, scale=scale)
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
