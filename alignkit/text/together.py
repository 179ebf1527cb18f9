"""A wing of what was loaded, whatever its module reads off of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from alignkit.memory import align_memory
from alignkit.options import LoRA
from alignkit.protocols import Wing
from alignkit.text.backend import TextBackend
from alignkit.text.handed import State
from alignkit.text.module import TextModule
from alignkit.text.policy import attach, checkpoint_layers, checkpointing_obstacle

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Made = TypeVar("Made")


def put_together(
    model: Any,
    tokenizer: Any,
    kind: Callable[..., Made],
    module_of: Callable[..., TextModule],
    *,
    in_hand: bool,
    adapter: LoRA | None,
    device: torch.device | str,
    dtype: torch.dtype,
    gradient_checkpointing: bool | str,
    seed: int,
    beside: Wing | None = None,
) -> Made:
    """A wing of what was loaded: adapter attached, placed, marked for training.

    Args:
        model, tokenizer: as loaded.
        kind, module_of: the classes of the wing and of its module.
        in_hand: whether the model is the caller's.
        adapter, device, gradient_checkpointing, seed, beside: as of
            `alignkit.text.wing.build`.
        dtype: of frozen weights and of the arithmetic.
    """
    before = State(model, gradients=in_hand)
    dtypes = {} if beside is not None else {p: p.dtype for p in model.parameters()}
    trained = "none"
    try:
        if beside is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)  # peft draws A from the global generator
                model, trained = attach(model, adapter)
    except BaseException:
        before.restore()
        raise
    if not getattr(model, "is_quantized", False):  # those are where they shall be
        model.to(device)
    align_memory(model)
    module = module_of(model, autocast=None if dtype == torch.float32 else dtype)
    if beside is not None and isinstance(beside.backend, TextBackend):
        beside.backend.beside.append(module)  # computes the same rows, and must be able to
    wing: Any = kind(
        model, tokenizer, module, adapter=trained, before=before, dtypes=dtypes, added=adapter
    )
    if gradient_checkpointing == "auto":
        on_gpu = torch.device(device).type == "cuda"
        gradient_checkpointing = on_gpu and checkpointing_obstacle(model) is None
    try:
        if gradient_checkpointing:
            checkpoint_layers(model)
    except BaseException:
        wing.undo()
        raise
    made: Made = wing
    return made
