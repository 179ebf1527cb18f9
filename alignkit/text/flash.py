"""Attention of packed rows by torch's flash kernel for CPUs, without copies of keys.

    o = (e^a o_prompt + e^b o_answer) / (e^a + e^b),     a, b the halves' log-sum-exps

All answers of a group meet their prompt in one call, and themselves in one call each. The kernel's
backward recomputes probabilities from the log-sum-exp that it is given: with that of the whole, the
gradients of the halves add up to that of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.text.packing import Group, spans


class SharedPrompt(torch.autograd.Function):
    """Causal softmax attention of every sequence of a packed row: (1, heads, T, size) each."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: tuple[Group, ...], scale: float
    ) -> Tensor:
        held, out = (query, key, value), _rows_like(query)
        dtype = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(query.shape[:3], dtype=dtype)
        for group in groups:
            _group_forward(held, out, lse, group, scale)
        ctx.save_for_backward(*held, out, lse)
        ctx.groups, ctx.scale = groups, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *held, out, lse = ctx.saved_tensors
        grads = tuple(_rows_like(tensor) for tensor in held)
        for group in ctx.groups:
            _group_backward(grads, (grad, *held, out, lse), group, ctx.scale)
        return (*grads, None, None)


def _rows_like(tensor: Tensor) -> Tensor:
    """Laid out as the projections before and after attention."""
    rows, heads, length, size = tensor.shape
    return tensor.new_empty(rows, length, heads, size).transpose(1, 2)


def _group_forward(
    held: Sequence[Tensor], out: Tensor, lse: Tensor, group: Group, scale: float
) -> None:
    prompt, answers, each = spans(group)
    out[:, :, prompt], lse[:, :, prompt] = _forward(_at(held, prompt), True, scale)
    if not each:
        return
    asked = [held[0][:, :, answers], *_at(held[1:], prompt)]
    over_prompt, there = _forward(asked, False, scale)
    for part in each:
        out[:, :, part], lse[:, :, part] = _forward(_at(held, part), True, scale)
    own = lse[:, :, answers]
    whole = torch.logaddexp(there, own)
    shares = [(half - whole).exp().unsqueeze(-1).to(out.dtype) for half in (own, there)]
    out[:, :, answers] = out[:, :, answers] * shares[0] + over_prompt * shares[1]
    lse[:, :, answers] = whole


def _group_backward(
    grads: Sequence[Tensor], given: Sequence[Tensor], group: Group, scale: float
) -> None:
    """`given`: the output's gradient, queries, keys, values, output, log-sum-exps."""
    prompt, answers, each = spans(group)
    for part in (prompt, *each):
        found = _backward(_at(given, part), True, scale)
        for grad, value in zip(grads, found, strict=True):
            grad[:, :, part] = value
    if not each:
        return
    asked = [
        *_at(given[:2], answers),
        *_at(given[2:4], prompt),
        *_at(given[4:], answers),
    ]
    found = _backward(asked, False, scale)
    for grad, where, value in zip(grads, (answers, prompt, prompt), found, strict=True):
        grad[:, :, where] += value


def _at(tensors: Sequence[Tensor], where: slice) -> list[Tensor]:
    return [tensor[:, :, where] for tensor in tensors]


def _forward(block: Sequence[Tensor], causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one block of queries, keys and values."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = kernel(*block, 0.0, causal, scale=scale)
    return out, lse


def _backward(block: Sequence[Tensor], causal: bool, scale: float) -> Sequence[Tensor]:
    """Of a block's gradient, queries, keys, values, output and log-sum-exp, their gradients."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found: Sequence[Tensor] = kernel(*block, 0.0, causal, scale=scale)
    return found
