"""SFT on images: the denoising loss of chosen, or only, images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit import SFT, ConfigError, DataError, ImageOptions, LoRA, TrainerOptions, build
from alignkit.bank import Repeated
from alignkit.losses import SUPERVISED_LOSSES
from alignkit.objectives.supervised import SupervisedObjective
from alignkit_diffusion.wing import build as build_wing
from tests.builders import loss_and_gradients
from tests.image.conftest import BUILD, make_pipeline, picture

WEIGHTS = (1.0, 2.0, 0.0)


def demonstrations() -> list[dict[str, Any]]:
    return [
        {"prompt": f"a {colour} circle", "image": picture(i), "weight": WEIGHTS[i]}
        for i, colour in enumerate(("red", "blue", "green"))
    ]


@torch.no_grad()
def by_diffusers(pipe: Any, batch: Any, draw: Any) -> float:
    """As in diffusers' text-to-image recipe: add_noise, the UNet, the mean squared error."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    total = count = 0.0
    for row, weight in enumerate(batch.weight.tolist()):
        latents, noise = batch.content.latents[row][None], draw.noise[row][None]
        timesteps = draw.timesteps[row : row + 1]
        predicted = pipe.unet(
            scheduler.add_noise(latents, noise, timesteps),
            timesteps,
            encoder_hidden_states=batch.content.prompts.hidden[row : row + 1],
            added_cond_kwargs={
                "text_embeds": batch.content.prompts.pooled[row : row + 1],
                "time_ids": batch.content.geometry[row : row + 1],
            },
        ).sample
        total += weight * torch.nn.functional.mse_loss(predicted.float(), noise.float()).item()
        count += weight
    return total / count


def test_the_loss_is_the_plain_denoising_error() -> None:
    pipe = make_pipeline()
    wing = build_wing(pipe, adapter=None, **BUILD)
    batch = wing.examples(demonstrations(), None, kind="supervised", seed=0).collate(
        range(3), [0] * 3
    )
    made = {"tokens": False, "scale": 2.0}
    objective = SupervisedObjective(wing.backend, SUPERVISED_LOSSES["nll"], **made)
    expected = by_diffusers(pipe, batch, wing.backend.draw(batch, (0, 1)))
    whole, gradients = loss_and_gradients(objective, batch)
    assert whole == pytest.approx(expected, rel=1e-5) and float(objective.normaliser(batch)) == 3
    single = SupervisedObjective(wing.backend, SUPERVISED_LOSSES["nll"], budget=1, **made)
    split, others = loss_and_gradients(single, batch)
    assert split == pytest.approx(whole, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-7)


def test_the_chosen_image_of_a_pair_is_learned() -> None:
    """Whatever the layout; a tie has no chosen image."""
    wing = build_wing(make_pipeline(), adapter=None, **BUILD)

    def latents(rows: list[dict[str, Any]], **options: Any) -> tuple[list[Any], dict[str, int]]:
        read = wing.examples(rows, ImageOptions(**options), kind="supervised", seed=0)
        content = read.collate(range(len(read)), [0] * len(read)).content
        return list(content.latents), dict(read.skipped)

    (alone,), _ = latents([{"prompt": "a cat", "image": picture(1)}])
    pair = {"prompt": "a cat", "chosen": picture(1), "rejected": picture(2)}
    picked = {"caption": "a cat", "jpg_0": picture(2), "jpg_1": picture(1), "label_0": 0}
    tie = {**picked, "label_0": 0.5}
    for row in (pair, picked):
        (found,), _ = latents([row])
        assert torch.equal(found, alone)
    found, skipped = latents([picked, tie])
    assert len(found) == 1 and skipped == {"tie": 1}
    with pytest.raises(DataError, match="tie"):
        latents([picked, tie], ties="error")
    with pytest.raises(DataError, match="margin"):
        latents([{**pair, "margin": 1.0}])


@torch.no_grad()
def test_held_out_images_have_a_loss_by_timestep() -> None:
    """One row at four draws, one in each quarter: each is the plain error there, and the loss
    their mean."""
    pipe = make_pipeline()
    wing = build_wing(pipe, adapter=None, **BUILD)
    made = {"tokens": False, "scale": 2.0}
    objective = SupervisedObjective(wing.backend, SUPERVISED_LOSSES["nll"], **made)
    examples = wing.examples(demonstrations()[:1], None, kind="supervised", seed=0)
    batch = Repeated(examples, 4).collate(range(4), [0] * 4)
    (micro,) = objective.micro_batches(batch, 0)
    found = {
        name: float(total / count) for name, (total, count) in objective.evaluate(micro).items()
    }
    draw = wing.backend.draw(batch, (0, 0))
    single = examples.collate([0], [0])
    expected = [
        by_diffusers(
            pipe,
            single,
            replace(draw, timesteps=draw.timesteps[k : k + 1], noise=draw.noise[k : k + 1]),
        )
        for k in range(4)
    ]
    assert list(found) == ["loss", *(f"loss/t{250 * k}-{250 * (k + 1)}" for k in range(4))]
    assert list(found.values())[1:] == pytest.approx(expected, rel=1e-5)
    assert found["loss"] == pytest.approx(sum(expected) / 4, rel=1e-5)


def play(folder: Path, steps: int, **arguments: Any) -> Any:
    run = build(
        make_pipeline(),
        SFT(),
        demonstrations(),
        eval_data=demonstrations(),
        trainer=TrainerOptions(
            max_steps=4, batch_size=3, learning_rate=1e-3, log_every=1, eval_every=4, save_every=1
        ),
        run_dir=folder,
        **arguments,
    )
    for record in run.steps():
        if record.step == steps:
            break
    run.folder.unlock()
    return run


@pytest.mark.slow
def test_a_low_rank_adapter_trains_saves_and_resumes_bit_exactly(tmp_path: Path) -> None:
    whole = play(tmp_path / "whole", 5, adapter=LoRA(rank=2))
    play(tmp_path / "stopped", 2, adapter=LoRA(rank=2))
    resumed = play(tmp_path / "stopped", 5, adapter=LoRA(rank=2))
    lines = [[line | {"seconds": 0} for line in run.history] for run in (whole, resumed)]
    assert lines[0] == lines[1] and len(lines[0]) == 4
    assert lines[0][-1]["eval/loss"] > lines[0][-1]["eval/loss/t750-1000"] > 0
    assert "eval/perplexity" not in lines[0][-1]
    whole.finish()
    pipe = make_pipeline()
    pipe.load_lora_weights(tmp_path / "whole" / "model")
    moved = [p for n, p in pipe.unet.named_parameters() if "lora_B" in n and bool((p != 0).any())]
    assert moved


def test_half_a_tie_is_refused() -> None:
    with pytest.raises(ConfigError, match="learns the chosen image, which a tie has not"):
        build(make_pipeline(), SFT(), demonstrations(), data_options=ImageOptions(ties="half"))
