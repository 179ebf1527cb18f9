"""Rows as others write them: each layout gives the images in the order of the preference."""

from __future__ import annotations

from typing import Any

import pytest

from alignkit.columns import BadRow
from alignkit.errors import ConfigError, DataError
from alignkit.options import ImageOptions, LoRA
from alignkit_diffusion import build
from alignkit_diffusion.layouts import LeftOut, read_layout
from tests.image.conftest import BUILD, make_pipeline, picture

PICK = {"caption": "a cat", "jpg_0": b"0", "jpg_1": b"1"}
HPD = {"prompt": "a cat", "image_path": ["a.jpg", "b.jpg"]}


def order(row: dict[str, Any], kind: str = "pairs") -> list[Any]:
    return [column if place is None else place for column, place in read_layout(row, kind).sources]


def test_pairs_of_every_layout_are_chosen_first() -> None:
    assert order({"prompt": "", "chosen": 1, "rejected": 2}) == ["chosen", "rejected"]
    assert order({**PICK, "label_0": 1, "label_1": 0}) == ["jpg_0", "jpg_1"]
    assert order({**PICK, "label_0": 0.0}) == ["jpg_1", "jpg_0"]
    assert order({**HPD, "human_preference": [1, 0]}) == [0, 1]
    assert order({**HPD, "human_preference": [0, 1]}) == [1, 0]
    assert order({"prompt": "", "path1": "a", "path2": "b"}) == ["path1", "path2"]


def test_ties_of_every_layout_have_no_first() -> None:
    for row in ({**PICK, "label_0": 0.5}, {**HPD, "human_preference": [1, 1]}):
        label = read_layout(row, "pairs").label
        assert label.tie and label.numbers["p_chosen"] == 0.5


def test_rankings_of_both_layouts() -> None:
    ours = {"prompt": "", "images": list("abc"), "ranking": [2, 0, 1]}
    assert read_layout(ours, "groups").label.rank == (2, 0, 1)
    hpd = {"prompt": "", "image_path": list("abc")}
    assert read_layout({**hpd, "rank": [3, 1, 2]}, "groups").label.rank == (2, 0, 1)
    assert read_layout({**hpd, "human_preference": [0, 1, 0]}, "groups").label.rank == (1, 0, 1)


def test_pick_a_pics_flags() -> None:
    assert read_layout({**PICK, "label_0": 1, "are_different": False}, "pairs").same
    assert not read_layout({**PICK, "label_0": 1, "are_different": "True"}, "pairs").same
    with pytest.raises(LeftOut, match="has_label"):
        read_layout({**PICK, "label_0": 0, "label_1": 0, "has_label": False}, "pairs")
    with pytest.raises(BadRow, match="are_different is true or false"):
        read_layout({**PICK, "label_0": 1, "are_different": "maybe"}, "pairs")


def test_rows_of_no_layout_say_what_they_lack() -> None:
    cases = [
        ({**HPD, "human_preference": [1]}, "one number per image, 2"),
        ({**HPD, "human_preference": 1}, "list of numbers"),
        ({**HPD, "image_path": ["a"], "human_preference": [1]}, "two images"),
        ({**HPD, "image_path": "a", "human_preference": [1]}, "image_path is a list"),
        (PICK, "label_0 or label_1"),
        ({**PICK, "label_0": 1, "label_1": 1}, "add up to 1"),
    ]
    for row, message in cases:
        with pytest.raises(BadRow, match=message):
            read_layout(row, "pairs")


@pytest.fixture(scope="module")
def wing() -> Any:
    return build(make_pipeline(), adapter=LoRA(rank=2), **BUILD)


def pair(number: int, prompt: str = "a cat", **columns: Any) -> dict[str, Any]:
    images = {"chosen": picture(2 * number, 16, 16), "rejected": picture(2 * number + 1, 16, 16)}
    return {"prompt": prompt, **images, **columns}


def read(wing: Any, rows: Any, kind: str = "pairs", **options: Any) -> Any:
    return wing.examples(rows, ImageOptions(resolution=16, **options), kind=kind, seed=0)


def test_small_margins_are_left_out_and_counted(wing: Any) -> None:
    rows = [
        pair(0, score_chosen=2.0, score_rejected=1.0),
        pair(1, score_chosen=1.2, score_rejected=1.0),
        pair(2, margin=0.5),
        pair(3, margin=0.4),
    ]
    found = read(wing, rows, min_margin=0.5)
    assert found.collate([0, 1], [0, 0]).row_id.tolist() == [0, 2]
    assert found.skipped == {"margin below min_margin": 2}
    with pytest.raises(DataError, match=r"Row 4 .*score_chosen.*margin"):
        read(wing, [*rows, pair(4)], min_margin=0.5)
    single = [{"prompt": "", "image": picture(0), "label": True}]
    with pytest.raises(ConfigError, match=r"min_margin is for pairs.*unpaired"):
        read(wing, single, kind="unpaired", min_margin=0.5)


def test_the_split_is_by_prompt_and_complete(wing: Any) -> None:
    prompts = ["a cat", "A  Cat", "dog", "house", "red", "blue", "big", "on", "the", "square"] * 2
    rows = [pair(i, prompt) for i, prompt in enumerate(prompts)]
    share = {"held_out_share": 0.4}
    parts = [read(wing, rows, part=part, **share) for part in ("train", "held_out")]
    numbers = [
        set(part.collate(range(len(part)), [0] * len(part)).row_id.tolist()) for part in parts
    ]
    assert not numbers[0] & numbers[1] and numbers[0] | numbers[1] == set(range(20))
    sides = [{prompts[number].lower().replace("  ", " ") for number in side} for side in numbers]
    assert all(sides) and not sides[0] & sides[1]
    assert parts[0].skipped == {"held out by their prompt": len(numbers[1])}
    assert parts[1].skipped == {}
    held_out = wing.prompts(rows, ImageOptions(resolution=16, part="held_out", **share), 20)
    assert set(held_out) == {prompts[number] for number in numbers[1]}


def test_posterior_samples_are_keyed_and_have_its_spread(wing: Any) -> None:
    rows = [pair(0), pair(1)]
    mean = read(wing, rows).collate([0, 1], [0, 0]).content.latents
    found = read(wing, rows, latents="sample")
    first, again = (found.collate([0, 1], [0, 0]).content.latents for _ in range(2))
    other = found.collate([0, 1], [1, 1]).content.latents
    pixels = (wing.policy.vae, rows[0]["chosen"])
    import numpy as np
    import torch

    values = torch.from_numpy(np.asarray(pixels[1]).transpose(2, 0, 1) / 127.5 - 1).float()
    with torch.no_grad():
        spread = pixels[0].encode(values[None]).latent_dist.std[0] * 0.13025
    noise = (first[0] - mean[0]) / spread
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0]) and not torch.equal(noise, first[1] - mean[1])
    assert abs(float(noise.mean())) < 0.2 and abs(float(noise.std()) - 1) < 0.15
