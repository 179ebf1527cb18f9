"""Noise, targets and timesteps against diffusers' own scheduler."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from alignkit.options import LoRA
from alignkit_diffusion import build
from alignkit_diffusion.schedule import read_schedule
from tests.image.conftest import BUILD, make_pipeline

SCHEDULES: dict[str, dict[str, Any]] = {
    "SDXL": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "linear": {"beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero terminal SNR": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    "short": {"beta_schedule": "scaled_linear", "num_train_timesteps": 40},
    "given betas": {"trained_betas": [0.1, 0.2, 0.3, 0.4]},
}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_and_targets_are_those_of_diffusers(name: str, prediction_type: str) -> None:
    theirs = diffusers.DDPMScheduler(**SCHEDULES[name], prediction_type=prediction_type)
    ours = read_schedule(theirs)
    assert len(ours) == theirs.config.num_train_timesteps or name == "given betas"
    t = torch.arange(len(ours))
    clean, noise = torch.randn(2, len(ours), 4, 3, 2, generator=torch.Generator().manual_seed(0))
    noisy = ours.add_noise(clean, noise, t)
    # diffusers multiplies a thousand factors in float32.
    assert torch.allclose(noisy, theirs.add_noise(clean, noise, t), atol=2e-5)
    target = theirs.get_velocity(clean, noise, t) if prediction_type == "v_prediction" else noise
    assert torch.allclose(ours.target(clean, noise, t), target, atol=2e-5)


def test_timesteps_are_drawn_from_all_of_the_schedule(rows: list[dict[str, Any]]) -> None:
    pipe = make_pipeline()
    pipe.scheduler = diffusers.DDPMScheduler(**SCHEDULES["short"])
    wing = build(pipe, adapter=LoRA(rank=2), **BUILD)
    batch = wing.examples(rows, None, kind="pairs", seed=0).collate(range(8), [0] * 8)
    drawn = [wing.backend.draw(batch, (0, step)).timesteps for step in range(60)]
    counts = torch.bincount(torch.cat(drawn), minlength=40)
    assert len(counts) == 40
    # 480 draws, 12 of each timestep: chi-squared with 39 degrees of freedom, 5 deviations wide.
    assert float(((counts - 12) ** 2 / 12).sum()) < 39 + 5 * (2 * 39) ** 0.5
