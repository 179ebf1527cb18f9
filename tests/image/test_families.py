"""Families beside SDXL's epsilon base: v and zero terminal SNR, four timesteps, SD 1.5 and 2.1."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignkit import DPO, GenerationOptions, LoRA, TrainerOptions, align
from alignkit.errors import ConfigError
from alignkit_diffusion import BaseAndRefiner, build
from alignkit_diffusion.families import check_class
from alignkit_diffusion.generation import image_generator
from alignkit_diffusion.lora import DIFFUSERS_FILE, KOHYA_FILE
from alignkit_diffusion.schedule import TURBO, read_schedule, zero_terminal_snr
from tests.image.conftest import BUILD, make_pipeline
from tests.image.sd15 import make_sd15

SHORT = GenerationOptions(steps=3, guidance_scale=3.0)


def zero_snr_pipeline() -> Any:
    """As the published models of this kind: v, a schedule that ends in noise, trailing spacing."""
    from diffusers import EulerDiscreteScheduler

    pipe = make_pipeline(prediction_type="v_prediction")
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return pipe


def batch_of(wing: Any, rows: list[dict[str, Any]]) -> Any:
    return wing.examples(rows, None, kind="pairs", seed=0).collate(range(4), [0] * 4)


@pytest.mark.parametrize("kind", ["uniform", "min_snr", "elbo", "nats"])
def test_zero_terminal_snr_has_finite_weights_of_v(kind: str) -> None:
    schedule = read_schedule(zero_snr_pipeline().scheduler)
    weights = schedule.weights(kind)
    assert weights.isfinite().all() and (weights >= 0).all()
    if kind == "nats":  # the limit of abar (snr_{T-1} / snr_T - 1) / 2, times 2 T
        snr = schedule.snr(torch.tensor([998]))
        assert weights[-1].item() == pytest.approx(1000 * float(snr), rel=1e-6)


def test_zero_terminal_snr_of_noise_has_no_elbo() -> None:
    pipe = zero_snr_pipeline()
    noise = copy.copy(read_schedule(pipe.scheduler))
    object.__setattr__(noise, "prediction_type", "epsilon")
    assert noise.weights("min_snr").isfinite().all()
    for kind in ("elbo", "nats"):
        with pytest.raises(ConfigError, match="ends in pure noise"):
            noise.weights(kind)


@pytest.mark.slow
def test_zero_terminal_snr_trains_and_samples(rows: list[dict[str, Any]]) -> None:
    pipe = zero_snr_pipeline()
    options = TrainerOptions(max_steps=2, batch_size=4, learning_rate=1e-3)
    result = align(pipe, DPO(), rows, adapter=LoRA(rank=2), trainer=options)
    assert result.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-8)
    found = result.sample(["a red circle"], steps=3)[0]
    expected = pipe(
        "a red circle", num_inference_steps=3, guidance_scale=5.0, generator=image_generator(0, 0)
    ).images[0]
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 1


def test_turbo_knows_four_timesteps_and_ends_in_noise(rows: list[dict[str, Any]]) -> None:
    """The schedule is Algorithm 1 of Lin et al. as diffusers has it."""
    from diffusers import DDPMScheduler

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    theirs = DDPMScheduler(**betas, rescale_betas_zero_snr=True).alphas_cumprod
    ours = zero_terminal_snr(read_schedule(DDPMScheduler(**betas)).alphas_cumprod)
    assert torch.allclose(ours.float(), theirs, atol=1e-5) and ours[-1] == 0
    wing = build(make_pipeline(), adapter=LoRA(rank=2), timesteps="turbo", **BUILD)
    batch = batch_of(wing, rows)
    drawn = torch.cat([wing.backend.draw(batch, (0, step)).timesteps for step in range(30)])
    assert set(drawn.tolist()) == set(TURBO)
    assert wing.describe()["timesteps"] == list(TURBO)
    draw = wing.backend.draw(batch, (0, 1))
    last = copy.copy(draw)
    object.__setattr__(last, "timesteps", torch.full((4,), 999))
    seen: list[torch.Tensor] = []
    handle = wing.policy.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    wing.backend.module(batch, last)
    handle.remove()
    assert torch.equal(seen[0], torch.stack(draw.noise).repeat_interleave(2, 0))
    # A reference beside it has the same schedule and the same timesteps.
    other = build(make_pipeline(), adapter=None, beside=wing, **BUILD)
    assert torch.equal(
        other.backend.module(batch, draw).total, wing.backend.module(batch, draw).total
    )


def test_timesteps_as_a_list(rows: list[dict[str, Any]]) -> None:
    weighted = {"timestep_weighting": "elbo", "timesteps": [700, 20, 300]}
    wing = build(make_pipeline(), adapter=LoRA(rank=2), **weighted, **BUILD)
    batch = batch_of(wing, rows)
    drawn = torch.cat([wing.backend.draw(batch, (0, step)).timesteps for step in range(20)])
    assert set(drawn.tolist()) == {20, 300, 700}
    weights = wing.backend.module._weights
    assert weights[[20, 300, 700]].mean().item() == pytest.approx(1)
    whole = read_schedule(make_pipeline().scheduler).weights("elbo")
    assert torch.allclose(weights / weights[20], whole / whole[20])


@pytest.mark.parametrize("wrong", [[], [1, 1], [-1], [1000]])
def test_timesteps_that_are_not_in_the_schedule_are_refused(wrong: list[int]) -> None:
    with pytest.raises(ConfigError, match="between 0 and 999"):
        build(make_pipeline(), adapter=LoRA(), timesteps=wrong, **BUILD)


def test_timesteps_and_methods() -> None:
    assert DPO(timesteps=[3, 1]).timesteps == (3, 1)
    with pytest.raises(ConfigError, match=r"Unknown timesteps 'turbp'.*'turbo'"):
        DPO(timesteps="turbp")  # type: ignore[arg-type]
    nats = DPO(timesteps="turbo", timestep_weighting="nats", beta=0.01)
    with pytest.raises(ConfigError, match="a sum over all timesteps"):
        align(make_pipeline(), nats, [])


@pytest.mark.parametrize("version", ["1.5", "2.1"])
def test_sd15_equals_a_float64_derivation(version: str, rows: list[dict[str, Any]]) -> None:
    pipe = make_sd15(version=version)
    wing = build(pipe, adapter=None, **BUILD)
    assert wing.describe()["family"] == "sd15"
    batch = batch_of(wing, rows)
    draw = wing.backend.draw(batch, (5, 7))
    found = wing.backend.module(batch, draw).total
    unet = copy.deepcopy(pipe.unet).double()
    unet.config.dtype = torch.float64
    embedded = [pipe.encode_prompt(row["prompt"], "cpu", 1, False)[0][0] for row in rows[:4]]
    for answer in range(8):
        group = answer // 2
        t = int(draw.timesteps[group])
        abar = pipe.scheduler.alphas_cumprod[t].double().item()
        clean, noise = batch.content.latents[answer].double(), draw.noise[group].double()
        noisy = math.sqrt(abar) * clean + math.sqrt(1 - abar) * noise
        with torch.no_grad():
            made = unet(noisy[None], torch.tensor(t), embedded[group][None].double()).sample[0]
        v = math.sqrt(abar) * noise - math.sqrt(1 - abar) * clean
        error = (made - (noise if version == "1.5" else v)).square().mean().item()
        assert found[answer].item() == pytest.approx(-error / 2, rel=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.5", "2.1"])
def test_sd15_trains_saves_and_samples(
    version: str, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    make_sd15(version=version).save_pretrained(folder)
    options = TrainerOptions(max_steps=3, batch_size=4, learning_rate=1e-2, log_every=1)
    result = align(
        str(folder),
        DPO(),
        rows,
        adapter=LoRA(rank=2),
        trainer=options,
        generation=SHORT,
        run_dir=tmp_path / "run",
    )
    assert result.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-8)
    assert result.history[-1]["loss"] != result.history[0]["loss"]
    found = np.asarray(result.sample(["a red circle"], steps=3, guidance_scale=3.0)[0])
    for name in (DIFFUSERS_FILE, KOHYA_FILE):
        pipe = make_sd15(version=version)
        pipe.load_lora_weights(tmp_path / "run" / "model", weight_name=name)
        pipe.set_progress_bar_config(disable=True)
        generator = image_generator(0, 0)
        expected = pipe(
            "a red circle", num_inference_steps=3, guidance_scale=3.0, generator=generator
        ).images[0]
        assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1, name
    going_on = LoRA(continue_from=str(tmp_path / "run" / "model"))
    again = build(str(folder), adapter=going_on, **BUILD)
    assert again.adapter == "continued"


def test_a_reference_of_another_family_is_refused() -> None:
    wing = build(make_sd15(), adapter=LoRA(rank=2), **BUILD)
    with pytest.raises(ConfigError, match="family 'sd15' against 'sdxl'"):
        build(make_pipeline(), adapter=None, beside=wing, **BUILD)


def test_other_families_are_refused_with_the_fix() -> None:
    for name in ("StableDiffusion3Pipeline", "FluxPipeline"):
        with pytest.raises(ConfigError, match=r"flow model.*families\.Family.*xl-base"):
            check_class(name, "'x'")
    with pytest.raises(ConfigError, match=r"refiner.*BaseAndRefiner"):
        check_class("StableDiffusionXLImg2ImgPipeline", "'x'")
    labelled = make_sd15()
    labelled.unet.register_to_config(class_embed_type="timestep")
    with pytest.raises(ConfigError, match=r"on text alone.*'timestep'"):
        build(labelled, adapter=LoRA(), **BUILD)


def make_refiner() -> Any:
    """One text encoder, five size numbers."""
    from diffusers import StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel

    base = make_pipeline()
    config = dict(base.unet.config) | {
        "cross_attention_dim": 24,
        "projection_class_embeddings_input_dim": 5 * 8 + 20,
    }
    parts = base.components | {
        "unet": UNet2DConditionModel.from_config(config).eval(),
        "text_encoder": None,
        "tokenizer": None,
    }
    return StableDiffusionXLImg2ImgPipeline(
        **parts, requires_aesthetics_score=True, add_watermarker=False
    )


def test_base_and_refiner_sample_as_diffusers_documents() -> None:
    base, refiner = make_pipeline(), make_refiner()
    found = BaseAndRefiner(base, refiner).sample(
        ["a cat", "a red circle"], GenerationOptions(steps=5, guidance_scale=3.0), seed=3
    )
    shared = {
        "prompt": "a red circle",
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "generator": image_generator(3, 1),
    }
    latents = base(**shared, denoising_end=0.8, output_type="latent").images
    expected = refiner(**shared, denoising_start=0.8, image=latents).images[0]
    assert np.array_equal(np.asarray(found[1]), np.asarray(expected))
    with pytest.raises(ConfigError, match="StableDiffusionXLImg2ImgPipeline as its refiner"):
        BaseAndRefiner(base, base)
