"""Who sees whom in a packed row, and attention by explicit masks: any pattern, any device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from alignkit.text.packing import Group, spans

Made = TypeVar("Made")


class PackedMask:
    """Who sees whom in a packed row, in the layers of one kind.

    Args:
        groups: the sequences of the row.
        pattern: transformers' mask function of a sequence that stands alone: (batch, head, query
            positions, key positions) -> bool.
        reach: how many positions back it sees; None is all.
        kernels: names of what computes the row, in order (kernels.py).
        calls: where each layer's attention is noted, if anybody asks.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        pattern: Callable[..., Tensor],
        reach: int | None,
        kernels: Sequence[str] = (),
        calls: list[Any] | None = None,
    ) -> None:
        self.groups = groups
        self.pattern = pattern
        self.longest = max(group.longest for group in groups)
        self.reach = None if reach is not None and reach >= self.longest else reach
        self.kernels = kernels
        self.calls = calls
        self._made: dict[Hashable, Any] = {}

    @cached_property
    def slides(self) -> bool:
        """Whether each token sees itself and the `reach` - 1 before it: not so in chunks."""
        if self.reach is None:
            return False
        query = torch.arange(self.longest)[:, None]
        key = query + torch.tensor([-self.reach, 1 - self.reach, 0, 1])
        seen = self.pattern(0, 0, query, key)
        wanted = (key > query - self.reach) & (key <= query)
        return bool(((seen == wanted) | (key < 0)).all())

    def made(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What layers share: made by the first, found by those after it."""
        if key not in self._made:
            self._made[key] = make()
        found: Made = self._made[key]
        return found

    def between(self, begin: int, length: int, first: int, device: torch.device) -> Tensor:
        """(length, begin + length - first) bool: queries from `begin` on, keys from `first` on."""

        def make() -> Tensor:
            places = torch.arange(first, begin + length, device=device)
            return self.pattern(0, 0, places[begin - first :, None], places[None])

        return self.made((begin, length, first), make)


def repeated(query: Tensor, tensor: Tensor) -> Tensor:
    """Grouped-query attention: every key head serves so many query heads."""
    repeats = query.shape[1] // tensor.shape[1]
    return tensor if repeats == 1 else tensor.repeat_interleave(repeats, 1)


def masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: PackedMask,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Sequence by sequence with an explicit mask: any pattern, any device."""
    key, value = repeated(query, key), repeated(query, value)
    parts = []
    for group in mask.groups:
        prompt, _, each = spans(group)
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
    own = where.stop - where.start
    attend = nn.functional.scaled_dot_product_attention
    if softcap is None and mask.reach is None:
        # No mask is made: GPUs have a kernel that counts from the lower right.
        return attend(q, k, v, attn_mask=causal_lower_right(own, begin + own), scale=scale)
    allowed = mask.between(begin, own, first, query.device)
    if softcap is None:
        return attend(q, k, v, attn_mask=allowed, scale=scale)
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
