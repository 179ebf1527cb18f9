"""A pipeline in hand through whole runs: trained in place, and otherwise left as it came."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from alignkit import DPO, GenerationOptions, LoRA, TrainerOptions, align, build
from alignkit.errors import ConfigError, DataError, NonFiniteError
from tests.image.conftest import make_pipeline

QUICK = GenerationOptions(steps=1)
BAD = [{"prompt": "a", "chosen": "gone.png", "rejected": "gone.png"}]


def options(**changed: Any) -> TrainerOptions:
    given = {"max_steps": 2, "batch_size": 4, "precision": "fp32", "learning_rate": 1e-3}
    return TrainerOptions(**(given | changed))


def pipeline(dtype: torch.dtype = torch.float32) -> Any:
    """Unusual in all that a run may not change."""
    pipe = make_pipeline()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        nn.Module.to(part, dtype)
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    pipe.unet.requires_grad_(False)
    pipe.unet.conv_in.requires_grad_(True)
    pipe.scheduler.set_timesteps(7)
    return pipe


def left(pipe: Any) -> dict[str, Any]:
    """All of the pipeline but the UNet's values and what lies in an adapter's layers."""
    modules = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}

    def own(name: str) -> bool:
        return not any(mark in name for mark in ("lora_", "base_layer"))

    return {
        "identities": {n: id(part) for n, part in pipe.components.items()},
        "modes": {
            f"{n}.{k}": m.training
            for n, part in modules.items()
            for k, m in part.named_modules()
            if own(k)
        },
        "flags": {
            f"{n}.{k.replace('.base_layer', '')}": (p.dtype, p.device, p.requires_grad)
            for n, part in modules.items()
            for k, p in part.named_parameters()
            if "lora_" not in k
        },
        "hooks": [k for k, m in pipe.unet.named_modules() if m._forward_pre_hooks],
        "timesteps": pipe.scheduler.timesteps.tolist(),
        "values": {
            f"{n}.{k}": p.detach().float().sum().item()
            for n, part in modules.items()
            if n != "unet"
            for k, p in part.named_parameters()
        },
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)])
def test_after_a_run_only_the_weights_are_others(
    dtype: torch.dtype, adapter: LoRA | None, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    pipe = pipeline(dtype)
    before, weights = left(pipe), [p.detach().clone() for p in pipe.unet.parameters()]
    result = align(
        pipe,
        DPO(),
        rows,
        adapter=adapter,
        run_dir=tmp_path / "run",
        generation=QUICK,
        trainer=options(learning_rate=0.1, sample_every=1),
    )
    assert result.model is pipe
    assert left(pipe) == before
    own = [p for n, p in pipe.unet.named_parameters() if "lora_" not in n]
    moved = [not torch.equal(a, b) for a, b in zip(weights, own, strict=True)]
    assert all(moved) if adapter is None else not any(moved)
    # Sampling goes on working, at the precision of the run where the weights allow it.
    first, second = (np.asarray(result.sample(["a cat"])[0]) for _ in range(2))
    assert np.array_equal(first, second)
    assert left(pipe) == before
    assert pipe("a cat", num_inference_steps=1, height=16, width=16).images, "one dtype throughout"


def test_weights_that_are_rounded_are_told_of(
    rows: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    for dtype, adapter, told in (
        (torch.bfloat16, None, True),
        (torch.bfloat16, LoRA(rank=2), False),
        (torch.float32, None, False),
    ):
        caplog.clear()
        align(pipeline(dtype), DPO(), rows, adapter=adapter, trainer=options())
        assert any("came in bfloat16" in record.message for record in caplog.records) == told


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)])
def test_a_run_that_could_not_begin_leaves_no_trace(
    adapter: LoRA | None, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    pipe = pipeline(torch.bfloat16)
    before, parts = left(pipe), [id(m) for m in pipe.unet.modules()]
    given: dict[str, Any] = {"adapter": adapter, "generation": QUICK, "trainer": options()}
    with pytest.raises(DataError, match=r"gone\.png"):
        align(pipe, DPO(), BAD, run_dir=tmp_path / "run", **given)
    assert left(pipe) == before and [id(m) for m in pipe.unet.modules()] == parts
    assert not hasattr(pipe.unet, "peft_config")
    # The same call with mended data works, in the same folder.
    assert len(align(pipe, DPO(), rows, run_dir=tmp_path / "run", **given).history) == 2


def test_an_adapter_that_does_not_fit_leaves_no_trace(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    pipe = pipeline()
    before = left(pipe)
    align(make_pipeline(), DPO(), rows, adapter=LoRA(rank=2), run_dir=tmp_path / "run",
          generation=QUICK, trainer=options(max_steps=1))  # fmt: skip
    other = make_pipeline(width=48)
    for adapter, text in (
        (LoRA(targets="atention"), "Did you mean"),
        (LoRA(continue_from=str(tmp_path)), "has no .safetensors file"),
    ):
        with pytest.raises(ConfigError, match=text):
            align(pipe, DPO(), rows, adapter=adapter, trainer=options())
        assert left(pipe) == before and not hasattr(pipe.unet, "peft_config")
    before = left(other)
    continued = LoRA(continue_from=str(tmp_path / "run" / "model"))
    with pytest.raises(ConfigError, match=r"does not fit this UNet: .*size mismatch") as caught:
        align(other, DPO(), rows, adapter=continued, trainer=options())
    assert len(str(caught.value)) < 1000
    assert left(other) == before and not hasattr(other.unet, "peft_config")
    assert len(align(other, DPO(), rows, adapter=LoRA(rank=2), trainer=options()).history) == 2


def test_a_run_that_broke_off_can_be_tried_again(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """`align` leaves no trace of it; whoever holds the loop keeps what was trained."""
    pipe = pipeline(torch.bfloat16)
    before, parts = left(pipe), [id(m) for m in pipe.unet.modules()]
    given: dict[str, Any] = {"adapter": LoRA(rank=2), "generation": QUICK}
    poisoned = pipe.unet.conv_out.bias.data.clone()
    pipe.unet.conv_out.bias.data.fill_(math.nan)
    with pytest.raises(NonFiniteError):
        align(pipe, DPO(), rows, trainer=options(), **given)
    pipe.unet.conv_out.bias.data.copy_(poisoned)
    assert left(pipe) == before and [id(m) for m in pipe.unet.modules()] == parts
    run = build(pipe, DPO(), rows, trainer=options(max_steps=4), **given)
    with pytest.raises(NonFiniteError):
        for record in run.steps():
            if record.step == 2:
                pipe.unet.conv_out.bias.data.fill_(math.nan)
    assert left(pipe) == before
    factors = [p for n, p in pipe.unet.named_parameters() if "lora_B" in n]
    assert any(bool(factor.any()) for factor in factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loop_that_was_left_goes_on_to_the_last_bit(
    dtype: torch.dtype, rows: list[dict[str, Any]]
) -> None:
    """In between the pipeline is the caller's, rounded weights and all."""
    histories = []
    for stop in (None, 2):
        pipe = pipeline(dtype)
        before = left(pipe)
        run = build(pipe, DPO(), rows, trainer=options(max_steps=4))
        for record in run.steps():
            if record.step == stop:
                break
        assert left(pipe) == before
        for _ in run.steps():
            pass
        assert left(pipe) == before
        histories.append([line["loss"] for line in run.finish().history])
    assert len(histories[0]) == 4 and histories[0] == histories[1]


def test_a_reference_in_hand_is_left_as_it_came(rows: list[dict[str, Any]]) -> None:
    reference = pipeline(torch.bfloat16)
    before, weights = left(reference), [p.detach().clone() for p in reference.unet.parameters()]
    result = align(
        make_pipeline(), DPO(), rows, adapter=LoRA(rank=2), reference=reference, trainer=options()
    )
    assert len(result.history) == 2
    assert left(reference) == before
    own = reference.unet.parameters()
    assert all(torch.equal(a, b) for a, b in zip(weights, own, strict=True))


def test_a_finished_run_comes_back_whatever_its_adapter(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Named layers, DoRA, an adapter that was continued: loaded as it was saved."""
    first = tmp_path / "named" / "model"
    cases = {
        "named": LoRA(rank=2, targets=("to_q", "ff.net.2")),
        "dora": LoRA(rank=3, alpha=5, kind="dora", targets="attention"),
        "again": LoRA(continue_from=str(first)),
    }
    for name, adapter in cases.items():
        given: dict[str, Any] = {
            "adapter": adapter,
            "run_dir": tmp_path / name,
            "generation": QUICK,
            "trainer": options(learning_rate=0.05),
        }
        done = align(make_pipeline(), DPO(), rows, **given)
        again = align(make_pipeline(), DPO(), rows, **given)
        assert again.history == done.history
        for left_one, right_one in zip(
            done.sample(["a cat"]), again.sample(["a cat"]), strict=True
        ):
            assert np.abs(np.asarray(left_one, int) - np.asarray(right_one, int)).max() <= 1


def test_a_finished_run_of_a_pipeline_that_carried_its_adapter(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    pipe = make_pipeline()
    align(pipe, DPO(), rows, adapter=LoRA(rank=2), trainer=options())
    given: dict[str, Any] = {
        "run_dir": tmp_path / "run",
        "generation": QUICK,
        "trainer": options(learning_rate=0.05),
    }
    align(pipe, DPO(), rows, **given)
    with pytest.raises(ConfigError, match=r"carries 'default'.*unload_lora_weights"):
        align(pipe, DPO(), rows, **given)
    pipe.unload_lora_weights()
    assert len(align(pipe, DPO(), rows, **given).history) == 2
    assert pipe.unet.peft_config
