"""Rankings and single labelled images: the rules of pairs, for any number of images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.errors import DataError
from alignkit.options import ImageOptions, LoRA
from alignkit_diffusion import build
from tests.image.conftest import BUILD, make_pipeline, picture

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def wing() -> Any:
    return build(make_pipeline(), adapter=LoRA(rank=2), **BUILD)


def read(wing: Any, rows: Any, kind: str, **changes: Any) -> Any:
    return wing.examples(rows, ImageOptions(resolution=16, **changes), kind=kind, seed=0)


def everything(examples: Any, epoch: int = 0) -> Any:
    return examples.collate(range(len(examples)), [epoch] * len(examples))


def ranked(first: int = 0, count: int = 3, **more: Any) -> dict[str, Any]:
    images = [picture(first + i, 16 + 2 * i, 16) for i in range(count)]
    return {"prompt": "a cat", "images": images, "scores": [0.5, 2, 1, 0][:count], **more}


def single(seed: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"a {seed} cat", "image": picture(seed, 16, 16), "label": True, **more}


def test_rankings_of_uneven_size(wing: Any) -> None:
    rows = [ranked(), ranked(10, 4, scores=None, ranking=[0, 1, 1, -1], weight=3)]
    batch = everything(read(wing, rows, "groups"))
    assert batch.group.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert batch.rank.tolist() == [2, 0, 1, 0, 1, 1, -1]
    assert batch.score[:3].tolist() == [0.5, 2, 1] and batch.score[3:].isnan().all()
    assert batch.weight.tolist() == [1, 3]
    assert batch.content.geometry[:, 1].tolist() == [16, 18, 20, 16, 18, 20, 22]
    assert len(batch.content.prompts) == 2
    found = wing.backend.module(batch, wing.backend.draw(batch, (0, 1)))
    assert found.total.shape == (7,)


def test_images_without_a_score_are_left_out(wing: Any) -> None:
    batch = everything(read(wing, [ranked(scores=[1, None, 2])], "groups"))
    assert batch.rank.tolist() == [1, 0]
    assert batch.content.geometry[:, 1].tolist() == [16, 20]


def test_crop_and_flip_are_shared_by_the_whole_ranking(wing: Any) -> None:
    strip = picture(7, 64, 16)
    rows = [{"prompt": "a cat", "images": [strip] * 3, "ranking": [0, 1, 2]} for _ in range(6)]
    how = {"crop": "random", "flip": True, "identical_pairs": "keep"}
    content = everything(read(wing, rows, "groups", **how)).content
    for group in range(6):
        one, two, three = content.latents[3 * group : 3 * group + 3]
        assert torch.equal(one, two) and torch.equal(one, three)
    assert len(content.geometry[:, 3].unique()) > 3


def test_ties_and_identical_images_by_policy(wing: Any) -> None:
    same = ranked()
    same["images"] = same["images"][:1] * 3
    rows = [ranked(scores=[1, 1, 1]), same, ranked()]
    dropped = read(wing, rows, "groups")
    assert dropped.skipped == {"tie": 1, "all answers are the same": 1}
    kept = read(wing, rows, "groups", ties="half", identical_pairs="keep")
    assert everything(kept).rank.tolist()[:3] == [0, 0, 0] and everything(kept).p_chosen is None
    with pytest.raises(DataError, match=r"Row 0 .*tie"):
        read(wing, rows, "groups", ties="error")


def test_labelled_images_and_their_mismatches(wing: Any) -> None:
    rows = [single(1), single(2, label="false"), single(1, image=picture(5, 20, 16)), single(3)]
    examples = read(wing, rows, "unpaired")
    batch = everything(examples)
    assert batch.desirable.tolist() == [True, False, True, True]
    assert examples.mismatched(range(4)) == [1, 2, 3, 0]
    assert examples.mismatched([0, 2, 1]) == [2, 2, 0]
    other = batch.content.recombine([0, 3], [1, 2])
    assert torch.equal(other.prompts.hidden, batch.content.prompts.hidden[[0, 3]])
    assert torch.equal(other.latents[0], batch.content.latents[1])
    assert torch.equal(other.geometry, batch.content.geometry[[1, 2]])


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("groups", {"images": "a.png"}, "images is a list"),
        ("groups", {"images": [picture(0), "gone.png", picture(1)]}, r"'images\[1\]'.*gone\.png"),
        ("groups", {"scores": [1, 2]}, "one number per answer, 3; got 2"),
        ("unpaired", {"image": None}, "'image'.*got nothing"),
        ("unpaired", {"label": "maybe"}, "label is true or false"),
        ("unpaired", {"prompt": None}, "a prompt is a string"),
    ],
)
def test_bad_rows_under_both_policies(kind: str, change: Any, words: str, wing: Any) -> None:
    good = {"groups": ranked(), "unpaired": single(0)}[kind]
    data = [good, {**good, **change}, good]
    with pytest.raises(DataError, match=rf"Row 1 .*{words}.*on_bad_row"):
        read(wing, data, kind)
    examples = read(wing, data, kind, on_bad_row="skip")
    assert everything(examples).row_id.tolist() == [0, 2]
    assert sum(examples.skipped.values()) == 1


def test_missing_columns_and_renamed_ones(wing: Any) -> None:
    with pytest.raises(DataError, match=r"'image', 'label' is missing.*columns of groups"):
        read(wing, [ranked()], "unpaired")
    row = ranked()
    row["pictures"] = row.pop("images")
    assert len(read(wing, [row], "groups", columns={"images": "pictures"})) == 1


def test_a_listed_image_that_changes_while_it_is_used(
    wing: Any, image_folder: Callable[[Rows], Path], tmp_path: Path
) -> None:
    folder = image_folder([{"prompt": "a cat", "one": picture(1), "two": picture(2)}])
    (line,) = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    row = {"prompt": "a cat", "images": [line["one"], line["two"]], "ranking": [1, 0]}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    examples = read(wing, folder, "groups", crop="random")
    picture(99).save(folder / "two_0.png")
    with pytest.raises(DataError, match=r"'images\[1\]' \(two_0\.png\).*changed"):
        examples.collate([0], [0])
