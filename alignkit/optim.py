"""Optimizers by name and the learning-rate schedule as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from alignkit.errors import ConfigError
from alignkit.options import TrainerOptions


def make_optimizer(
    parameters: Sequence[nn.Parameter], options: TrainerOptions, learning_rate: float
) -> torch.optim.Optimizer:
    """The optimizer over float32 master weights; decay spares biases and norms (ndim < 2)."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "adafactor":
        from transformers import Adafactor

        # As in the Diffusion-DPO recipe: a given learning rate and no scaling by parameter size.
        return Adafactor(groups, lr=learning_rate, scale_parameter=False, relative_step=False)
    if options.optimizer == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ConfigError(
                'trainer.optimizer="adamw_8bit" needs bitsandbytes, which is not installed: '
                "pip install 'alignkit[quantization]'."
            ) from error
        optimizer: Any = AdamW8bit(groups, lr=learning_rate)
        return optimizer
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def learning_rate_at(step: int, total: int, options: TrainerOptions, peak: float) -> float:
    """The rate of update `step` (1 is the first) of `total`; above 0 at every one of them.

    Warm-up is linear from peak / W to peak over W steps. Then constant, linear towards 0, or a half
    cosine towards 0, both of which would reach 0 one step after the last.
    """
    warmup = options.warmup
    steps = round(warmup * total) if isinstance(warmup, float) else warmup
    steps = min(steps, total)
    if step <= steps:
        return peak * step / steps
    done = (step - steps) / (total - steps + 1)
    if options.schedule == "linear":
        return peak * (1 - done)
    if options.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak
