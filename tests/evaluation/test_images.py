"""`evaluate()` of pipelines: the bank by timestep, pictures from one seed, edits, a sheet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alignkit import DPO, GenerationOptions, ImageOptions, LoRA, TrainerOptions, align, evaluate
from alignkit.capabilities import EditsPictures
from alignkit.errors import ConfigError
from alignkit_diffusion import build as build_wing
from alignkit_diffusion.generation import image_generator
from tests.image.conftest import BUILD, SIZES, make_pipeline, picture
from tests.image.test_held_out import one_by_one
from tests.test_report import Page

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)
STEPS = GenerationOptions(steps=4, guidance_scale=2.0)


def rows(num: int = 6) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"a {'red' if i % 2 else 'blue'} circle",
            "chosen": picture(2 * i, *SIZES[i]),
            "rejected": picture(2 * i + 1, *SIZES[-1 - i]),
        }
        for i in range(num)
    ]


def red(prompts: Any, images: Any, rows: Any) -> list[float]:
    return [float(np.asarray(one)[..., 0].mean()) for one in images]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    make_pipeline().save_pretrained(root / "base", safe_serialization=True)
    align(
        str(root / "base"),
        DPO(),
        rows(4),
        adapter=LoRA(rank=2),
        generation=STEPS,
        trainer=TrainerOptions(max_steps=3, batch_size=4, learning_rate=3e-2, precision="fp32"),
        run_dir=root / "run",
    )
    return root / "run"


def measured(run: Path, folder: Path, **more: Any) -> Any:
    picture(50, 30, 20).save(folder / "mine.png")
    (folder / "parti.tsv").write_text(
        "Prompt\tCategory\timage\na red circle\tShapes\tmine.png\n<b>cat</b>\tAnimals\t\n"
    )
    return evaluate(
        run,
        data=rows(),
        prompts=folder / "parti.tsv",
        reward=red,
        out=folder / "page",
        sheet=folder / "sheet",
        seed=5,
        **more,
    )


@pytest.fixture(scope="module")
def found(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return measured(run, tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def edited(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return measured(run, tmp_path_factory.mktemp("edited"), edit=(0.3, 1.0))


@pytest.mark.slow
def test_held_out_pairs_on_the_fixed_bank(run: Path, found: Any) -> None:
    base = run.parent / "base"
    wing = build_wing(str(base), **{**BUILD, "adapter": LoRA(continue_from=str(run / "model"))})
    expected = one_by_one(wing, rows(), seed=5)
    for name in ("accuracy/t0-250", "accuracy/t750-1000", "error/chosen", "error/rejected"):
        assert found.metrics[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-7), name
    assert (
        found.measures["accuracy"].num == 6 and "4 fixed draws" in found.measures["accuracy"].note
    )
    assert "kl" not in found.measures and "win_rate_at_equal_length" not in found.measures


def test_pictures_of_both_sides_from_one_noise(run: Path, found: Any) -> None:
    from alignkit.api import sample

    prompts = ["a red circle", "<b>cat</b>"]
    before = sample(run.parent / "base", prompts, STEPS, seed=5)
    after = sample(run, prompts, seed=5)
    for mine, theirs in zip(
        (*found.answers.before, *found.answers.after), (*before, *after), strict=True
    ):
        assert np.abs(np.asarray(mine, int) - np.asarray(theirs, int)).max() <= 1
    wins = [b > a for a, b in zip(red(0, before, 0), red(0, after, 0), strict=True)]
    assert found.metrics["win_rate"] == np.mean(wins)


@pytest.mark.slow
def test_edits_are_those_of_the_pipelines_own(run: Path, edited: Any) -> None:
    """Image to image at strength 0.3 of the base, by diffusers alone."""
    from diffusers import AutoPipelineForImage2Image, DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(run.parent / "base")
    editor = AutoPipelineForImage2Image.from_pipe(pipe)
    strip = edited.strips[0]
    assert (strip.way, strip.prompt) == ("image to image", "a red circle")
    mine = Image.open(edited.folder.parent / "mine.png")
    assert np.array_equal(np.asarray(strip.source), np.asarray(mine))
    from PIL import ImageOps

    expected = editor(
        prompt=strip.prompt,
        image=ImageOps.fit(mine, (16, 16)),
        strength=0.3,
        num_inference_steps=4,
        guidance_scale=2.0,
        generator=image_generator(5, 0),
    ).images[0]
    got = strip.rows[str(run.parent / "base")][0]
    assert np.abs(np.asarray(got, int) - np.asarray(expected, int)).max() <= 1
    model = strip.rows[edited.model]
    assert len(model) == 2 and not np.array_equal(np.asarray(model[0]), np.asarray(got))


@pytest.mark.slow
def test_edited_pictures_are_compared_by_the_reward(run: Path, edited: Any) -> None:
    base, strips = str(run.parent / "base"), edited.strips[:2]
    won = [red(0, one.rows[edited.model], 0)[1] > red(0, one.rows[base], 0)[1] for one in strips]
    assert edited.metrics["win_rate/image_to_image_1"] == np.mean(won)
    assert edited.measures["win_rate/inpainting_0.3"].num == 2


@pytest.mark.slow
def test_inpainting_keeps_what_the_mask_leaves(run: Path, edited: Any) -> None:
    """Both sides paint the middle anew, each its own way; around it both keep one picture."""
    for strip in edited.strips[2:]:
        assert strip.way == "inpainting"
        base, model = (
            np.asarray(strip.rows[side][1], float)
            for side in (str(run.parent / "base"), edited.model)
        )
        change = np.abs(base - model).mean(axis=2)  # (16, 16)
        frame = np.ones((16, 16), bool)
        frame[2:14, 2:14] = False  # beyond what the VAE's convolutions carry over the mask's edge
        assert change[4:12, 4:12].mean() > 2 * change[frame].mean()


@pytest.mark.slow
def test_the_page_shows_all_of_it(edited: Any) -> None:
    page = Page(edited.page)
    assert "strength 0.3" in page.text and "<b>cat</b>" in page.text
    assert "b" not in {tag for tag, _ in page.tags}, "prompts are escaped"
    # Two prompts by two sides; two ways of editing each at two strengths by two sides.
    assert len(page.pictures()) == 2 * 2 + 2 * 2 + 2 * 2 * 2 * 2
    assert all(attributes["alt"] for attributes in page.pictures())
    told = json.loads((edited.folder / "evaluation.json").read_text())
    assert told["modality"] == "image" and told["settings"]["edit"] == [0.3, 1.0]
    assert (edited.folder / "before" / "0000.png").is_file()
    assert len(list((edited.folder.parent / "sheet" / "images").iterdir())) == 4


def test_what_edits_cannot_do_is_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="shares above 0"):
        evaluate(run, prompts=["x"], edit=(1.5,))
    wing = build_wing(make_pipeline(), adapter=None, **BUILD)
    assert isinstance(wing, EditsPictures)
    with pytest.raises(ConfigError, match=r"leaves at least one of generation\.steps=4"):
        wing.edit(["x"], [picture(0)], STEPS, strength=0.2, seed=0)


@pytest.mark.slow
def test_a_strength_of_one_forgets_the_picture_and_a_small_one_keeps_it() -> None:
    wing = build_wing(make_pipeline(), adapter=None, **BUILD)
    source = picture(3, 16, 16)
    many = GenerationOptions(steps=10, guidance_scale=1.0)
    given = {"seed": 0}
    near, far = (
        wing.edit(["a red circle"], [source], many, strength=s, **given)[0] for s in (0.1, 1.0)
    )
    pixels = torch.from_numpy(np.array(source)).permute(2, 0, 1)[None] / 127.5 - 1
    decoded = wing._autoencoder.decode(wing._autoencoder.encode(pixels))
    plain = ((decoded[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) * 255).numpy()

    def away(one: Any) -> float:
        return float(np.abs(np.asarray(one, float) - plain).mean())

    assert away(near) < away(far)
    assert ImageOptions().eval_draws == 4
