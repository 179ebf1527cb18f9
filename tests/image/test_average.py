"""The moving average of the policy: its formula, and where it stands in for the policy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from alignkit.average import Average

ALONE: Any = SimpleNamespace(whole=lambda value: value, like=lambda value, _: value)


def test_equals_the_recursion_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    average = Average({"w": weight}, 0.5, modules=[], runtime=ALONE)
    expected, seen = 1.0, 1.0
    for step in range(1, 30):
        weight.data += 0.1 * step
        seen += 0.1 * step
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * seen
        average.update(step)
    assert average.values["w"][0].item() == pytest.approx(expected, rel=1e-5)
    with average.on():
        assert weight[0].item() == pytest.approx(expected, rel=1e-5)
        with average.on():
            assert weight[0].item() == pytest.approx(expected, rel=1e-5)
    assert weight[0].item() == pytest.approx(seen, rel=1e-5)


def test_options() -> None:
    from alignkit import TrainerOptions
    from alignkit.errors import ConfigError

    for wrong in (1.0, -0.1, 1.5):
        with pytest.raises(ConfigError, match=r"trainer\.ema"):
            TrainerOptions(ema=wrong)


@pytest.mark.slow
def test_a_run_keeps_evaluates_and_resumes_the_average(tmp_path: Path) -> None:
    """What is saved is the average of the weights that an identical run without one goes through,
    and an interrupted run ends with the same bits."""
    from safetensors.torch import load_file

    from alignkit import DPO, GenerationOptions, LoRA, TrainerOptions, build
    from tests.faults.runs import assert_same_folder
    from tests.image.conftest import make_pipeline, picture

    rows = [
        {"prompt": "a cat", "chosen": picture(2 * i), "rejected": picture(2 * i + 1)}
        for i in range(4)
    ]

    def start(run_dir: Path | None, ema: float | None = 0.6) -> Any:
        trainer = TrainerOptions(
            max_steps=6,
            batch_size=2,
            learning_rate=1e-2,
            save_every=None if run_dir is None else 2,
            eval_every=3,
            ema=ema,
        )
        return build(
            make_pipeline(),
            DPO(),
            rows,
            eval_data=rows,
            adapter=LoRA(rank=2),
            trainer=trainer,
            generation=GenerationOptions(steps=1),
            run_dir=run_dir,
        )

    plain = start(None, ema=None)
    own = dict(plain.trainer.parameters)
    expected = {name: p.detach().clone() for name, p in own.items()}
    for record in plain.steps():
        decay = min(0.6, (1 + record.step) / (10 + record.step))
        for name, parameter in own.items():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    run = start(tmp_path / "one")
    list(run.steps())
    last = {name: p.detach().clone() for name, p in run.trainer.parameters.items()}
    assert all(torch.equal(last[name], p.detach()) for name, p in own.items())
    result = run.finish()
    for name, parameter in run.trainer.parameters.items():
        assert torch.allclose(parameter.detach(), expected[name], atol=1e-6)
    saved = load_file(tmp_path / "one" / "model" / "pytorch_lora_weights.safetensors")
    (key,) = [k for k in saved if "mid_block" in k and "attn1.to_q.lora_B" in k]
    (name,) = [n for n in expected if "mid_block" in n and "attn1.to_q.lora_B" in n]
    assert torch.allclose(saved[key], expected[name], atol=1e-6)
    assert result.metrics["eval/rewards/margins"] != plain.metrics["eval/rewards/margins"]

    two = start(tmp_path / "two")
    for record in two.steps():
        if record.step == 5:
            two.folder.unlock()
            break
    again = start(tmp_path / "two")
    list(again.steps())
    again.finish()
    assert_same_folder(tmp_path / "two", tmp_path / "one")
