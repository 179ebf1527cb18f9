"""Convolutions with channels innermost: the same function, and weights in hand as they came."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit import DPO, LoRA, TrainerOptions, build
from tests.faults.runs import assert_same_folder
from tests.image.conftest import make_pipeline
from tests.image.test_runs import go_on, start


def layouts(unet: Any) -> set[bool]:
    """Whether channels are innermost, of the convolutions where it makes a difference."""
    weights = [p for p in unet.parameters() if p.ndim == 4 and min(p.shape[1], p.shape[2]) > 1]
    return {p.is_contiguous(memory_format=torch.channels_last) for p in weights}


@pytest.mark.parametrize("adapter", [LoRA(rank=2), None], ids=["lora", "whole"])
def test_channels_last_is_the_same_training(
    adapter: LoRA | None, rows: list[dict[str, Any]]
) -> None:
    losses = []
    for wanted in (False, True):
        options = TrainerOptions(
            max_steps=3, batch_size=4, learning_rate=1e-5, channels_last=wanted
        )
        pipe = make_pipeline()
        run = build(pipe, DPO(), rows, adapter=adapter, trainer=options)
        run.wing.engage()
        assert layouts(pipe.unet) == {wanted}
        losses.append([record.loss for record in run.steps()])
        assert layouts(pipe.unet) == {False}
    assert losses[1][0] == pytest.approx(math.log(2), abs=1e-8)
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


@pytest.mark.slow
def test_resuming_keeps_the_layout(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """The optimizer's moments come back in the order of their parameters' memory."""
    go_on(start(rows, tmp_path / "one", channels_last=True))
    go_on(start(rows, tmp_path / "two", channels_last=True), until=3)
    go_on(start(rows, tmp_path / "two", channels_last=True))
    assert_same_folder(tmp_path / "two", tmp_path / "one")
