"""The picture world keeps its own rules, and the shipped pipeline draws that world."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from alignkit.demo import scene_world
from alignkit.demo.scene_judge import _kind_seen
from alignkit.demo.scene_world import (
    KINDS,
    Scene,
    SceneObject,
    ScenePrompt,
    attribute_score,
    draw_caption,
    draw_scene,
    known_reward,
    make_pairs,
    make_prompts,
    read_prompt,
    render,
    split_of,
    write_pairs,
)

MODEL = Path(__file__).parents[2] / "alignkit" / "demo" / "models" / "sdxl"
PROMPT = "a red circle and a blue square"
SWAPPED = "a blue square and a red circle"
RED = SceneObject("circle", "red", 0.25, 0.5, 0.17)
BLUE = SceneObject("square", "blue", 0.75, 0.5, 0.11)


def picture(*objects: SceneObject, background: str = "white") -> Image.Image:
    return render(Scene(objects, background))


def test_prompts_are_distinct_repeatable_and_split_by_composition() -> None:
    heldout, train = make_prompts(300, 1, "heldout"), make_prompts(300, 1, "train")
    assert len({prompt.text for prompt in heldout}) == 300
    assert heldout == make_prompts(300, 1, "heldout")
    assert heldout != make_prompts(300, 2, "heldout")
    assert not _compositions(heldout) & _compositions(train)
    assert {split_of(prompt) for prompt in train} == {"train"}


def _compositions(prompts: list[ScenePrompt]) -> set[frozenset[tuple[str, str]]]:
    return {frozenset((item.colour, item.kind) for item in prompt.objects) for prompt in prompts}


def test_too_many_prompts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scene_world, "_draw_open", lambda rng, split: read_prompt(PROMPT))
    assert len(make_prompts(1, 0)) == 1
    with pytest.raises(ValueError, match="no 2 distinct prompts"):
        make_prompts(2, 0)


def test_prompts_survive_json_and_reading_back() -> None:
    for prompt in make_prompts(50, 3):
        assert ScenePrompt.from_dict(json.loads(json.dumps(prompt.to_dict()))) == prompt
        assert read_prompt(prompt.text) == prompt


def test_reading_a_prompt_finds_what_it_says() -> None:
    prompt = read_prompt("a large red circle on the left and a blue square on a black background")
    first, second = prompt.objects
    assert (first.colour, first.kind, first.size, first.place) == ("red", "circle", "large", "left")
    assert (second.size, second.place, prompt.background) == (None, None, "black")
    assert read_prompt("a red circle above a blue square").relation == "above"
    with pytest.raises(ValueError, match="no coloured shape"):
        read_prompt("a fine day")


def test_drawn_scenes_have_everything_their_caption_says() -> None:
    rng = np.random.default_rng(4)
    for index in range(200):
        prompt = draw_caption(rng)
        scene = draw_scene(prompt, rng)
        assert attribute_score(prompt, render(scene, seed=index)) == 1.0, prompt.text
        for named, item in zip(prompt.objects, scene.objects, strict=True):
            assert named.size in (None, item.size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("radius", [0.10, 0.18])
def test_kinds_are_told_apart_at_every_size(kind: str, radius: float) -> None:
    item = SceneObject(kind, "green", 0.4, 0.6, radius)
    pixels = np.asarray(picture(item, background="black"))
    assert _kind_seen(pixels[..., 1] > 90) == kind


def test_reward_follows_each_of_its_grades() -> None:
    best = known_reward(PROMPT, picture(RED, replace(BLUE, radius=0.17)))
    assert best > 0.95
    for worse in (
        (replace(RED, y=0.35), replace(BLUE, radius=0.17, y=0.65)),  # not level
        (replace(RED, x=0.3), replace(BLUE, radius=0.17, x=0.7, y=0.6)),  # less apart, less level
        (RED, BLUE),  # one is small
    ):
        assert known_reward(PROMPT, picture(*worse)) < best - 0.05


def test_reward_is_graded_by_level_by_distance_and_by_size() -> None:
    by_level = [
        known_reward(PROMPT, picture(RED, replace(BLUE, y=y))) for y in (0.5, 0.57, 0.64, 0.71)
    ]
    by_distance = [
        known_reward(PROMPT, picture(RED, replace(BLUE, x=x, y=0.85)))
        for x in (0.65, 0.55, 0.45, 0.35)
    ]
    by_size = [
        known_reward(PROMPT, picture(RED, replace(BLUE, radius=radius)))
        for radius in (0.16, 0.145, 0.13, 0.115)
    ]
    for rewards in (by_level, by_distance, by_size):
        assert min(-np.diff(rewards)) > 0.02


def test_reward_takes_no_notice_of_order() -> None:
    image = picture(RED, BLUE)
    assert known_reward(PROMPT, image) == pytest.approx(known_reward(SWAPPED, image))


def test_reward_belongs_to_the_prompt_and_not_to_the_picture() -> None:
    yellow = SceneObject("circle", "yellow", 0.25, 0.8, 0.11)
    image = picture(RED, replace(BLUE, radius=0.17), yellow)
    assert known_reward(PROMPT, image) > 0.95
    assert known_reward("a yellow circle and a blue square", image) < 0.6
    assert known_reward("a green circle and a blue square", image) == 0.0


def test_a_missing_object_earns_nothing() -> None:
    assert known_reward(PROMPT, picture(RED)) == 0.0
    assert known_reward(PROMPT, picture(RED, replace(BLUE, colour="green"))) == 0.0


def test_reward_bears_soft_noisy_pictures() -> None:
    image = picture(RED, BLUE, background="grey")
    noise = np.random.default_rng(0).normal(0, 12, (64, 64, 3))
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(1.2))) + noise
    worn = Image.fromarray(np.clip(soft, 0, 255).astype(np.uint8))
    assert known_reward(PROMPT, worn) == pytest.approx(known_reward(PROMPT, image), abs=0.04)
    assert attribute_score(PROMPT, worn) == 1.0


@pytest.mark.parametrize(
    "objects",
    [
        pytest.param((RED,), id="one missing"),
        pytest.param((replace(RED, kind="square"), BLUE), id="wrong kind"),
        pytest.param((replace(RED, kind="square"), replace(BLUE, kind="circle")), id="kinds mixed"),
        pytest.param((replace(RED, colour="purple"), BLUE), id="wrong colour"),
        pytest.param((RED, BLUE, SceneObject("circle", "yellow", 0.5, 0.15, 0.1)), id="one extra"),
        pytest.param((RED, BLUE, replace(RED, x=0.5, y=0.15, radius=0.1)), id="one twice"),
    ],
)
def test_attribute_score_falls_for_wrong_pictures(objects: tuple[SceneObject, ...]) -> None:
    assert attribute_score(PROMPT, picture(RED, BLUE)) == 1.0
    assert attribute_score(PROMPT, picture(*objects)) < 0.9


def test_attribute_score_takes_no_side_on_the_judged_relations() -> None:
    other_way = picture(replace(RED, x=0.75, radius=0.11), replace(BLUE, x=0.25, radius=0.17))
    assert attribute_score(PROMPT, other_way) == attribute_score(PROMPT, picture(RED, BLUE)) == 1.0


def test_pairs_prefer_the_higher_reward_with_equal_attributes() -> None:
    rows = make_pairs(60, 5)
    for row in rows:
        prompt = read_prompt(row["prompt"])
        assert split_of(prompt) == "train"
        gap = known_reward(prompt, row["chosen"]) - known_reward(prompt, row["rejected"])
        assert gap >= 0.1
        assert attribute_score(prompt, row["chosen"]) == 1.0
        assert attribute_score(prompt, row["rejected"]) == 1.0
    again = make_pairs(60, 5)
    assert all(
        a["chosen"].tobytes() == b["chosen"].tobytes() for a, b in zip(rows, again, strict=True)
    )


def test_written_pairs_name_their_files(tmp_path: Path) -> None:
    rows = make_pairs(3, 6)
    write_pairs(tmp_path / "pairs", rows)
    lines = (tmp_path / "pairs" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    for line, row in zip(map(json.loads, lines), rows, strict=True):
        assert set(line) == {"prompt", "chosen", "rejected"}
        assert line["prompt"] == row["prompt"]
        for side in ("chosen", "rejected"):
            with Image.open(tmp_path / "pairs" / line[side]) as image:
                assert image.tobytes() == row[side].tobytes()


def test_shipped_folder_is_small_and_holds_safetensors_only() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 7_500_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}


# diffusers hands NumPy a tensor when it computes the sigmas.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_shipped_pipeline_draws_held_out_prompts() -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.DiffusionPipeline.from_pretrained(MODEL, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe, diffusers.StableDiffusionXLPipeline)
    parts = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    assert {part.dtype for part in parts} == {torch.float32}
    prompts = make_prompts(32, 8, "heldout")
    images = pipe(
        [prompt.text for prompt in prompts],
        num_inference_steps=20,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
    ).images
    assert images[0].size == (64, 64)
    scores = [attribute_score(p, image) for p, image in zip(prompts, images, strict=True)]
    rewards = [known_reward(p, image) for p, image in zip(prompts, images, strict=True)]
    strangers = [attribute_score(p, i) for p, i in zip(prompts[1:], images[:-1], strict=True)]
    assert np.mean(scores) > 0.9
    assert np.mean(strangers) < 0.7
    # The base model leaves room for what the preference pairs will teach.
    assert 0.2 < np.mean(rewards) < 0.6
