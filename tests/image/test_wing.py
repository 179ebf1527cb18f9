"""Building, refusing, sampling, and leaving the caller's pipeline alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.options import GenerationOptions, ImageOptions, LoRA
from alignkit_diffusion import build
from tests.image.conftest import BUILD, make_pipeline

SHORT = GenerationOptions(steps=3)


def state_of(pipe: Any) -> dict[str, Any]:
    """Everything of a pipeline that a run must not change."""
    parts = {n: p for n, p in pipe.components.items() if isinstance(p, torch.nn.Module)}
    return {
        "scheduler": (type(pipe.scheduler), dict(pipe.scheduler.config)),
        "timesteps": pipe.scheduler.timesteps.tolist(),
        "config": dict(pipe.config),
        "identities": {n: id(p) for n, p in pipe.components.items()},
        "progress": getattr(pipe, "_progress_bar_config", None),
        **{
            name: [
                (n, p.dtype, p.device, p.requires_grad, p.detach().clone().tolist())
                for n, p in part.named_parameters()
            ]
            for name, part in parts.items()
            if name != "unet"
        },
        "training": {n: p.training for n, p in parts.items() if n != "unet"},
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)])
def test_a_pipeline_in_hand_is_left_as_it_was(
    dtype: torch.dtype, adapter: LoRA | None, rows: list[dict[str, Any]]
) -> None:
    pipe = make_pipeline()
    pipe.vae.to(dtype)
    pipe.text_encoder.to(dtype)
    pipe.text_encoder_2.to(dtype).train()
    next(pipe.vae.parameters()).requires_grad_(False)
    pipe.scheduler.set_timesteps(7)
    unet, before = pipe.unet, state_of(pipe)
    wing = build(pipe, adapter=adapter, **{**BUILD, "gradient_checkpointing": True})
    options = ImageOptions(resolution=16, flip=True)
    batch = wing.examples(rows[:2], options, kind="pairs", seed=0).collate([0, 1], [0, 1])
    wing.backend.module(batch, wing.backend.draw(batch, (0, 1))).total.sum().backward()
    wing.sample(["a cat"], SHORT, seed=0)
    wing.describe()
    assert wing.policy is pipe and pipe.unet is unet
    assert state_of(pipe) == before
    assert not unet.training and not unet.is_gradient_checkpointing


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)])
def test_a_half_precision_unet_in_hand_computes_in_the_precision_asked_for(
    adapter: LoRA | None, rows: list[dict[str, Any]]
) -> None:
    values = []
    for precision in ("fp32", "bf16"):
        pipe = make_pipeline().to(torch.bfloat16)
        weights = [p.detach().float().clone() for p in pipe.unet.parameters()]
        wing = build(pipe, adapter=adapter, **{**BUILD, "precision": precision})
        whole = adapter is None or precision == "fp32"
        base = [p for n, p in pipe.unet.named_parameters() if ".lora_" not in n]
        assert {p.dtype for p in base} == {torch.float32 if whole else torch.bfloat16}
        assert all(torch.equal(a, b.float()) for a, b in zip(weights, base, strict=True))
        batch = wing.examples(rows[:2], None, kind="pairs", seed=0).collate([0, 1], [0, 0])
        values.append(wing.backend.module(batch, wing.backend.draw(batch, (0, 1))).total)
        assert all(image.size == (16, 16) for image in wing.sample(["a"], SHORT, seed=0))
    assert torch.allclose(*values, atol=2e-2)


def test_the_native_size_holds_where_none_is_given(rows: list[dict[str, Any]]) -> None:
    wing = build(make_pipeline(), adapter=LoRA(rank=2), **BUILD)
    for options, side in ((ImageOptions(flip=True), 16), (ImageOptions(resolution=24), 24)):
        examples = wing.examples(rows[:2], options, kind="pairs", seed=0)
        geometry = examples.collate([0, 1], [0, 0]).content.geometry
        assert geometry[:, 4:].unique().tolist() == [side]
        assert wing.describe()["resolution"] == side


def test_a_folder_is_loaded(pipeline_folder: Path, rows: list[dict[str, Any]]) -> None:
    wing = build(pipeline_folder, adapter=LoRA(rank=2), **BUILD)
    assert wing.modality == "image" and wing.tokenizer is None
    assert wing.default_options == ImageOptions(resolution=16)
    facts = wing.describe()
    assert facts["class"] == "StableDiffusionXLPipeline"
    assert facts["prediction_type"] == "epsilon" and facts["num_timesteps"] == 1000
    assert json.loads(json.dumps(facts)) == facts
    in_hand = build(make_pipeline(), adapter=LoRA(rank=2), **BUILD)
    scores = []
    for one in (wing, in_hand):
        batch = one.examples(rows[:2], None, kind="pairs", seed=0).collate([0, 1], [0, 0])
        scores.append(one.backend.module(batch, one.backend.draw(batch, (0, 1))).total)
    assert torch.allclose(*scores, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_the_vae_exact(
    precision: str, pipeline_folder: Path, rows: list[dict[str, Any]]
) -> None:
    half = build(pipeline_folder, adapter=LoRA(rank=2), **{**BUILD, "precision": precision})
    full = build(pipeline_folder, adapter=LoRA(rank=2), **BUILD)
    batches = [
        wing.examples(rows[:2], None, kind="pairs", seed=0).collate([0, 1], [0, 0])
        for wing in (half, full)
    ]
    for one, two in zip(*(batch.content.latents for batch in batches), strict=True):
        assert torch.allclose(one, two, atol=1e-6)
    # All parts of the pipeline that users get have one dtype, so that it can be called as it is.
    dtypes = {next(part.parameters()).dtype for part in (half.policy.unet, half.policy.vae)}
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float16}


def edited(folder: Path, target: Path, file: str, **changes: Any) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / file).read_text())
    config.update(changes)
    (target / file).write_text(json.dumps(config))
    return target


def test_other_pipelines_are_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    index = "model_index.json"
    cases = [
        (index, {"_class_name": "FluxPipeline"}, r"FluxPipeline.*stable-diffusion-xl-base"),
        (index, {"_class_name": "KolorsPipeline"}, "is a KolorsPipeline"),
        (index, {"_class_name": "StableDiffusionXLImg2ImgPipeline"}, "refiner"),
        (index, {"text_encoder": [None, None], "tokenizer": [None, None]}, "both text encoders"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "'sample'"),
    ]
    for number, (file, changes, text) in enumerate(cases):
        folder = edited(pipeline_folder, tmp_path / str(number), file, **changes)
        with pytest.raises(ConfigError, match=text):
            build(str(folder), adapter=LoRA(), **BUILD)
    with pytest.raises(ConfigError, match="diffusers folder"):
        build(str(tmp_path / "gone" / "away"), adapter=LoRA(), **BUILD)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="diffusers folder"):
        build(str(tmp_path / "empty"), adapter=LoRA(), **BUILD)
    with pytest.raises(ConfigError, match="is a Linear"):
        build(torch.nn.Linear(1, 1), adapter=LoRA(), **BUILD)
    with pytest.raises(ConfigError, match="precision 'fp8'"):
        build(make_pipeline(), adapter=LoRA(), **{**BUILD, "precision": "fp8"})


def test_weights_other_than_safetensors_are_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(pipeline_folder, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(make_pipeline().unet.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ConfigError, match="safetensors"):
        build(str(folder), adapter=LoRA(), **BUILD)


@pytest.mark.parametrize("plain_too", [False, True])
def test_variant_files_are_taken_where_there_are_no_plain_ones(
    plain_too: bool, pipeline_folder: Path, tmp_path: Path
) -> None:
    """A download of the half-precision files alone; plain ones beside them come first."""
    folder = tmp_path / "pipeline"
    half = make_pipeline()
    for part in (half.unet, half.vae, half.text_encoder, half.text_encoder_2):
        torch.nn.Module.to(part, torch.float16)
    half.save_pretrained(folder, variant="fp16")
    if plain_too:
        shutil.copytree(pipeline_folder, folder, dirs_exist_ok=True)
    wing = build(str(folder), adapter=LoRA(rank=2), **BUILD)
    exact = [p.detach() for p in make_pipeline().unet.parameters()]
    expected = exact if plain_too else [p.half().float() for p in exact]
    own = [p for n, p in wing.policy.unet.named_parameters() if ".lora_" not in n]
    assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))
    assert {p.dtype for p in (*own, *wing.policy.vae.parameters())} == {torch.float32}


def test_pipelines_in_hand_that_lack_parts_are_refused() -> None:
    for name in ("vae", "scheduler", "tokenizer_2"):
        pipe = make_pipeline()
        setattr(pipe, name, None)
        with pytest.raises(ConfigError, match=f"in memory lacks {name}"):
            build(pipe, adapter=LoRA(), **BUILD)
    endless = make_pipeline()
    endless.tokenizer_2.model_max_length = 10**30
    with pytest.raises(ConfigError, match=r"tokenizer_2 must cut prompts to the 16 tokens"):
        build(endless, adapter=LoRA(), **BUILD)


def test_pipelines_in_hand_that_do_not_fit_are_refused() -> None:
    import diffusers

    refiner = make_pipeline()
    refiner.register_modules(text_encoder=None, tokenizer=None)
    with pytest.raises(ConfigError, match=r"both text encoders.*refiner"):
        build(refiner, adapter=LoRA(), **BUILD)
    five = make_pipeline()
    five.unet.add_embedding.linear_1 = torch.nn.Linear(5 * 8 + 20, 64)
    with pytest.raises(ConfigError, match="takes 5"):
        build(five, adapter=LoRA(), **BUILD)
    flow = make_pipeline()
    flow.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ConfigError, match="FlowMatchEulerDiscreteScheduler without"):
        build(flow, adapter=LoRA(), **BUILD)
    inpainting = make_pipeline()
    inpainting.unet.register_to_config(in_channels=9)
    with pytest.raises(ConfigError, match="takes 9"):
        build(inpainting, adapter=LoRA(), **BUILD)
    variance = make_pipeline()
    variance.unet.register_to_config(out_channels=8)
    with pytest.raises(ConfigError, match="gives 8"):
        build(variance, adapter=LoRA(), **BUILD)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"prediction_type": "v_prediction"}, "prediction_type 'epsilon' against 'v_prediction'"),
        ({"latent_channels": 3}, "in_channels 4 against 3"),
        ({"beta_end": 0.02}, r"another noise schedule"),
    ],
)
def test_references_that_cannot_be_compared_are_refused(other: dict[str, Any], text: str) -> None:
    wing = build(make_pipeline(), adapter=LoRA(rank=2), **BUILD)
    with pytest.raises(ConfigError, match=f"{text}.*own lineage"):
        build(make_pipeline(**other), adapter=None, beside=wing, **BUILD)
    same = build(make_pipeline(scheduler="DDIMScheduler"), adapter=None, beside=wing, **BUILD)
    assert not any(p.requires_grad for p in same.policy.unet.parameters())


@pytest.mark.parametrize(
    "scheduler",
    [
        "DDPMScheduler",
        "DDIMScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
    ],
)
def test_the_schedule_does_not_depend_on_the_sampler(scheduler: str) -> None:
    from alignkit_diffusion.schedule import read_schedule

    found = read_schedule(make_pipeline(scheduler=scheduler).scheduler)
    plain = read_schedule(make_pipeline().scheduler)
    assert torch.equal(found.alphas_cumprod, plain.alphas_cumprod)


def test_zero_terminal_snr_is_read() -> None:
    from diffusers import DDIMScheduler

    from alignkit_diffusion.schedule import read_schedule

    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert read_schedule(scheduler).alphas_cumprod[-1].item() == pytest.approx(0, abs=1e-12)


def test_samples_are_keyed_by_seed_and_place() -> None:
    wing = build(make_pipeline(), adapter=LoRA(rank=2), **BUILD)
    prompts = ["a cat", "a dog", "a cat"]
    first = [np.asarray(image) for image in wing.sample(prompts, SHORT, seed=0)]
    again = [np.asarray(image) for image in wing.sample(prompts, SHORT, seed=0)]
    other = [np.asarray(image) for image in wing.sample(prompts, SHORT, seed=1)]
    fewer = [np.asarray(image) for image in wing.sample(prompts[:2], SHORT, seed=0)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert not np.array_equal(first[0], first[2])
    for a, b in zip(first[:2], fewer, strict=True):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 2
    assert first[0].shape == (16, 16, 3)
    assert wing.sample([], SHORT, seed=0) == []


def test_samples_are_what_the_pipeline_itself_makes() -> None:
    from alignkit_diffusion.generation import image_generator

    wing = build(make_pipeline(), adapter=LoRA(rank=2), **BUILD)
    options = GenerationOptions(steps=4, guidance_scale=3.0, height=24, width=16)
    found = wing.sample(["a red circle"], options, seed=5)[0]
    expected = make_pipeline()(
        "a red circle",
        num_inference_steps=4,
        guidance_scale=3.0,
        height=24,
        width=16,
        generator=image_generator(5, 0),
    ).images[0]
    assert found.size == (16, 24)
    assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 1


def test_sizes_that_cannot_be_sampled_are_refused() -> None:
    wing = build(make_pipeline(), adapter=LoRA(rank=2), **BUILD)
    with pytest.raises(ConfigError, match=r"generation\.width must be a multiple of 8.*Take 16"):
        wing.sample(["a"], GenerationOptions(width=18), seed=0)


def test_auto_splits_by_memory() -> None:
    from alignkit_diffusion.memory import MemoryModel

    class Widths:
        config = type("Config", (), {"block_out_channels": (320, 640, 1280)})

        @staticmethod
        def parameters() -> list[torch.Tensor]:
            return [torch.empty(2_567_463_684, dtype=torch.bfloat16, device="meta")]

    cpu = torch.device("cpu")
    sdxl = MemoryModel.of(Widths, device=cpu, precision="bf16")
    pair = 2 * 65536
    assert sdxl.bytes_per_element * pair == pytest.approx(10.55 * 2**30)
    assert sdxl.checkpointed().bytes_per_element * pair == pytest.approx(0.91 * 2**30)
    assert sdxl.groups(pair) == 1 and not sdxl.fits(pair)
    # A quarter of the weights' 4.78 GiB, by 0.91 for a pair.
    assert [sdxl.checkpointed().groups(pair // part) for part in (1, 2, 4)] == [1, 2, 5]
    wing = build(make_pipeline(), adapter=LoRA(rank=2), **BUILD)
    assert wing.backend.memory.groups(2 * 256) >= 64


def test_importing_the_package_is_free() -> None:
    code = (
        "import sys, alignkit_diffusion\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert alignkit_diffusion.__all__ == ['BaseAndRefiner', 'build']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    import alignkit_diffusion

    with pytest.raises(AttributeError, match="nothing"):
        _ = alignkit_diffusion.nothing


def test_loaded_weights_lie_where_copies_lie(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read there, without a copy; and are those of the files."""
    from safetensors.torch import load_file

    copied: list[Any] = []
    monkeypatch.setattr("alignkit_diffusion.policy.align_memory", copied.append)
    wing = build(pipeline_folder, adapter=None, **BUILD)
    stored = load_file(pipeline_folder / "unet" / "diffusion_pytorch_model.safetensors")
    weights = dict(wing.policy.unet.named_parameters())
    assert copied and not any(p.data_ptr() % 64 for p in weights.values())
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[name], stored[name]) for name in stored)
