"""Attention of packed rows by torch's flex attention: one compiled kernel for all rows.

Each token sees two stretches of the row, of its own sequence and of its prompt. How many pairs of a
block of 128 x 128 tokens see each other follows from their bounds on the host: blocks without any
are not computed, and in full ones nobody asks token by token.

    GPUs only; not run on real hardware
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from alignkit.text.masks import PackedMask
from alignkit.text.packing import spans

BLOCK = 128


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: PackedMask,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention of a packed row: (1, heads, T, size) each; any pattern, scores capped or not."""
    blocks = mask.made("flex", lambda: block_mask(mask, query.device))
    capped = None if softcap is None else mask.made(("cap", softcap), lambda: _capped(softcap))
    found: Tensor = compiled()(
        query,
        key,
        value,
        score_mod=capped,
        block_mask=blocks,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return found


@cache
def compiled() -> Callable[..., Any]:
    """Compiled once for rows of all lengths."""
    return torch.compile(flex_attention, dynamic=True)


def _capped(softcap: float) -> Callable[..., Tensor]:
    """score -> c tanh(score / c)"""

    def modify(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return modify


def bounds(mask: PackedMask) -> np.ndarray:
    """(4, T): of each token, where the stretches of its sequence and of its prompt that it sees
    begin and, of the prompt's, end; and its position in its own sequence.

    A window that slides shortens both. Its own stretch ends with the token itself.
    """
    length = max(g.start + g.prompt + sum(g.answers) for g in mask.groups)
    found = np.zeros((4, length), dtype=np.int64)
    back = mask.reach if mask.slides and mask.reach is not None else length
    for group in mask.groups:
        prompt, _, each = spans(group)
        for part in (prompt, *each):
            places = np.arange(part.start, part.stop)
            before = 0 if part == prompt else group.prompt
            position = before + places - part.start
            begin = np.maximum(part.start, places - back + 1)
            first = prompt.start + np.clip(position - back + 1, 0, before)
            last = np.full_like(places, prompt.start + before)
            found[:, part] = begin, first, last, position
    return found


def pairs(found: np.ndarray) -> np.ndarray:
    """(B, B): pairs of a token and one that it sees, in each block of queries and of keys."""
    begin, first, last, _ = found
    length = found.shape[1]
    number = -(-length // BLOCK)
    starts = np.arange(number) * BLOCK
    counts = np.zeros((number * BLOCK, number), dtype=np.int64)
    for low, high in ((begin, np.arange(1, length + 1)), (first, last)):
        overlap = np.minimum(high[:, None], starts + BLOCK) - np.maximum(low[:, None], starts)
        counts[:length] += np.maximum(overlap, 0)
    return counts.reshape(number, BLOCK, number).sum(1)


def block_mask(mask: PackedMask, device: torch.device) -> BlockMask:
    """The mask of a row, without a look at the device."""
    found = bounds(mask)
    seen = pairs(found)
    exact = mask.reach is None or mask.slides
    full = (seen == BLOCK * BLOCK) & exact
    lists = [_listed((seen > 0) & ~full), _listed(full)]
    parts = [part for one in lists for part in one] + [found]
    held = torch.from_numpy(np.concatenate([part.ravel() for part in parts]).astype(np.int32))
    if device.type == "cuda":
        held = held.pin_memory()
    held = held.to(device, non_blocking=True)
    split = held.split([part.size for part in parts])
    some, which, whole, whole_which, stretches = (
        tensor.view(part.shape) for tensor, part in zip(split, parts, strict=True)
    )
    length = found.shape[1]
    return BlockMask.from_kv_blocks(
        some,
        which,
        whole,
        whole_which,
        BLOCK_SIZE=BLOCK,
        mask_mod=_allowed(stretches, None if exact else mask.pattern),
        seq_lengths=(length, length),
    )


def _listed(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(1, 1, B) how many blocks of each row are chosen, and (1, 1, B, B) those before the rest."""
    order = np.argsort(~chosen, axis=1, kind="stable")
    return chosen.sum(1)[None, None], order[None, None]


def _allowed(stretches: Tensor, pattern: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    begin, first, last, position = stretches.unbind()

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (key >= begin[query]) & (key <= query)
        return own | ((key >= first[query]) & (key < last[query]))

    if pattern is None:
        return visible

    def limited(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = pattern(batch, head, position[query], position[key])
        return visible(batch, head, query, key) & seen

    return limited


def missing(device: torch.device) -> str | None:
    """Why a device does not have flex attention with gradients, or None."""
    if device.type != "cuda":
        return f"it has gradients on CUDA GPUs only, and not on {device.type!r}"
    return None
