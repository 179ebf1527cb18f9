"""Whether a model computes packed rows as it computes single ones: tried on itself, not assumed.

Recurrent layers carry one sequence into the next, biases by distance (ALiBi) count places of the
row, experts with a capacity count its tokens: all of them show in the numbers of two small groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from alignkit.batches import Batch
from alignkit.text.attention import NotPackable
from alignkit.text.content import TextContent
from alignkit.text.handed import base_of, max_positions, uncompiled
from alignkit.text.kernels import PLAIN, Call
from alignkit.text.module import TextModule

TOLERANCE = 1e-5
"""Largest difference of a token's numbers, in float32."""
LENGTHS = ((11, (3, 9, 6)), (4, (7, 5)))
"""Tokens of two prompts and their answers."""
WINDOW = 48
"""A sliding window up to this size is passed by the rows that are tried."""


@torch.no_grad()
def obstacle(module: TextModule, layout: str, calls: list[Call]) -> str | None:
    """Why the module cannot compute the layout, or None; and into `calls`, its layers' attention.

    The row is computed plainly here. Other kernels are tried by themselves (kernels.py).
    """
    if not module.takes_positions:
        return f"{_name(module)} takes no position_ids, so that answers cannot follow a prompt."
    batch = _sample(module)
    expected = _numbers(module, batch, "padded")
    try:
        with _plainly(module, calls):
            found = _numbers(module, batch, layout)
    except NotPackable as reason:
        return f"{_name(module)} cannot: {reason}."
    except Exception as error:
        return f"{_name(module)} fails on a packed row ({type(error).__name__}: {error})."
    apart = float((found - expected).abs().max())
    # What the model's own arithmetic makes of the same tokens in other company.
    alone = _numbers(module, batch.select([1]), "padded")
    rounding = float((alone - expected[3:, : alone.shape[1]]).abs().max())
    if apart <= max(TOLERANCE, 8 * rounding):
        return None
    return (
        f"a token's output in {_name(module)} depends on what else is in the row (by {apart:.1e})."
    )


@contextmanager
def _plainly(module: TextModule, calls: list[Call]) -> Iterator[None]:
    """Packed rows by torch's own attention; afterwards `calls` tells what was asked of it."""
    kept, module.kernels, module.calls = module.kernels, PLAIN, []
    try:
        yield
    finally:
        found, module.kernels, module.calls = module.calls, kept, None
        calls += [replace(call, dtype=module.autocast or call.dtype) for call in found]


def _name(module: TextModule) -> str:
    return type(base_of(module.model)).__name__


def _numbers(module: TextModule, batch: Batch, layout: str) -> torch.Tensor:
    laid = replace(batch, content=replace(batch.content, layout=layout))
    # Without autocast: its rounding would hide small differences.
    kept, module.autocast = module.autocast, None
    try:
        with uncompiled(module.model):
            return module.per_token(laid)
    finally:
        module.autocast = kept


def _sample(module: TextModule) -> Batch:
    """Two groups of ids from all over the vocabulary, always the same."""
    size = base_of(module.model).get_input_embeddings().weight.shape[0]
    windows = [getattr(config, "sliding_window", None) or 0 for config in module.configs]
    stretch = max((w for w in windows if w <= WINDOW), default=0)
    limit = max_positions(module.model) or 2**30
    stretch = max(0, min(stretch, limit - 20))
    draw = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return draw.integers(0, size, length, dtype=np.int32)

    prompts, completions, owner = [], [], []
    for group, (prompt, answers) in enumerate(LENGTHS):
        prompts.append(ids(prompt + stretch))
        completions += [ids(length) for length in answers]
        owner += [group] * len(answers)
    content = TextContent(tuple(prompts), tuple(completions), tuple(owner))
    return Batch(
        content=content,
        group=torch.tensor(owner),
        rank=torch.full((len(owner),), -1),
        position=torch.arange(2),
        row_id=torch.arange(2),
    )
