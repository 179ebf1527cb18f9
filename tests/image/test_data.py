"""Rows to encoded pairs: layouts, ties, bad rows, identical pairs, augmentation, conditioning."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.errors import ConfigError, DataError
from alignkit.options import ImageOptions, LoRA
from alignkit_diffusion import build
from alignkit_diffusion.autoencoder import Autoencoder
from tests.image.conftest import BUILD, SIZES, make_pipeline, picture

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def wing() -> Any:
    return build(make_pipeline(), adapter=LoRA(rank=2), **BUILD)


def options(**changes: Any) -> ImageOptions:
    return ImageOptions(resolution=16, **changes)


def read(wing: Any, rows: Any, seed: int = 0, **changes: Any) -> Any:
    return wing.examples(rows, options(**changes), kind="pairs", seed=seed)


def jpeg(seed: int, size: int = 24) -> bytes:
    buffer = io.BytesIO()
    picture(seed, size, size).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def everything(examples: Any, epoch: int = 0) -> Any:
    return examples.collate(range(len(examples)), [epoch] * len(examples))


def test_a_batch_is_what_the_rows_say(wing: Any, rows: Rows) -> None:
    batch = everything(read(wing, rows))
    assert batch.num_groups == 8 and batch.num_answers == 16
    assert batch.group.tolist() == [g for g in range(8) for _ in range(2)]
    assert batch.rank.tolist() == [0, 1] * 8
    assert batch.row_id.tolist() == list(range(8))
    assert batch.weight is None and batch.target_margin is None and batch.p_chosen is None
    chosen, rejected = batch.pairs()
    assert chosen.tolist() == list(range(0, 16, 2)) and rejected.tolist() == list(range(1, 16, 2))
    assert {latents.shape for latents in batch.content.latents} == {(4, 8, 8)}
    assert all(latents.dtype == torch.float32 for latents in batch.content.latents)


def test_time_ids_are_each_images_own(wing: Any, rows: Rows) -> None:
    geometry = everything(read(wing, rows)).content.geometry
    assert geometry.dtype == torch.float32
    for row in range(8):
        for side, size in enumerate((SIZES[row], SIZES[-1 - row])):
            width, height = size
            scale = 16 / min(size)
            top = round((round(height * scale) - 16) / 2)
            left = round((round(width * scale) - 16) / 2)
            assert geometry[2 * row + side].tolist() == [height, width, top, left, 16, 16]


def test_time_ids_reach_the_embedding_unrounded(rows: Rows) -> None:
    wing = build(make_pipeline(), adapter=LoRA(rank=2), **{**BUILD, "precision": "bf16"})
    # 1366 is 1368 in bfloat16.
    data = [{**rows[0], "chosen": picture(0, 64, 1366)}]
    batch = everything(read(wing, data))
    seen = []
    wing.policy.unet.add_time_proj.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    wing.backend.module(batch, wing.backend.draw(batch, (0, 1)))
    assert seen[0].dtype == torch.float32
    assert seen[0].view(2, 6)[0, 0].item() == 1366


def test_latents_are_the_scaled_posterior_mean(wing: Any, rows: Rows) -> None:
    batch = everything(read(wing, rows))
    vae = wing.policy.vae
    square = rows[1]["chosen"]
    assert square.size == (16, 16)  # no resize: the pixels themselves
    values = torch.tensor(list(square.get_flattened_data()), dtype=torch.float32).view(16, 16, 3)
    with torch.no_grad():
        posterior = vae.encode(values.permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
    expected = posterior.mean[0] * vae.config.scaling_factor
    assert torch.allclose(batch.content.latents[2], expected, atol=1e-5)


def test_shift_and_statistics_of_the_vae_are_used(pipe: Any) -> None:
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    plain = Autoencoder(pipe.vae, torch.device("cpu")).encode(image)
    pipe.vae.register_to_config(
        shift_factor=0.3, latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0]
    )
    autoencoder = Autoencoder(pipe.vae, torch.device("cpu"))
    mean, std = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    scale = pipe.vae.config.scaling_factor
    expected = (plain / scale - 0.3 - mean.view(1, 4, 1, 1)) * scale / std.view(1, 4, 1, 1)
    assert torch.allclose(autoencoder.encode(image), expected, atol=1e-5)
    with torch.no_grad():
        decoded = pipe.vae.decode(plain / scale).sample
    assert torch.allclose(autoencoder.decode(expected), decoded, atol=1e-4)


def test_images_are_encoded_once_per_content(rows: Rows, tmp_path: Path) -> None:
    wing = build(make_pipeline(), adapter=LoRA(rank=2), **BUILD)
    count = []
    wing.policy.vae.encoder.register_forward_pre_hook(lambda _, a: count.append(len(a[0])))
    shared = picture(50)
    shared.save(tmp_path / "same.png")
    data = [{**row, "chosen": shared} for row in rows[:3]]
    data += [{**row, "chosen": str(tmp_path / "same.png")} for row in rows[3:6]]
    examples = read(wing, data)
    for epoch in range(2):
        everything(examples, epoch)
    assert sum(count) == 7
    assert len(count) == 1  # and in one batch


def test_prompts_are_the_pipelines_embeddings(wing: Any, rows: Rows) -> None:
    batch = everything(read(wing, rows))
    for group, row in enumerate(rows):
        with torch.no_grad():
            hidden, _, pooled, _ = wing.policy.encode_prompt(
                row["prompt"], device="cpu", do_classifier_free_guidance=False
            )
        assert torch.allclose(batch.content.prompts.hidden[group], hidden[0], atol=1e-5)
        assert torch.allclose(batch.content.prompts.pooled[group], pooled[0], atol=1e-5)


@pytest.mark.parametrize("force_zeros", [True, False])
def test_dropped_captions(force_zeros: bool, rows: Rows) -> None:
    pipe = make_pipeline(force_zeros=force_zeros)
    wing = build(pipe, adapter=LoRA(rank=2), **BUILD)
    prompts = everything(read(wing, rows, caption_dropout=1.0)).content.prompts
    if force_zeros:
        assert not prompts.hidden.any() and not prompts.pooled.any()
        return
    with torch.no_grad():
        hidden, _, pooled, _ = pipe.encode_prompt(
            "", device="cpu", do_classifier_free_guidance=False
        )
    assert torch.allclose(prompts.hidden, hidden.expand(8, -1, -1), atol=1e-5)
    assert torch.allclose(prompts.pooled, pooled.expand(8, -1), atol=1e-5)


def test_an_empty_prompt_is_a_prompt(wing: Any, rows: Rows) -> None:
    assert rows[2]["prompt"] == ""
    assert everything(read(wing, rows[2:3])).content.prompts.hidden.any()


def test_caption_dropout_is_keyed_by_seed_epoch_and_row(wing: Any, rows: Rows) -> None:
    def dropped(examples: Any, epoch: int) -> list[bool]:
        hidden = everything(examples, epoch).content.prompts.hidden
        return [not one.any() for one in hidden]

    examples = read(wing, rows * 4, caption_dropout=0.5)
    first = dropped(examples, 0)
    assert 5 < sum(first) < 27
    assert first == dropped(examples, 0) == dropped(read(wing, rows * 4, caption_dropout=0.5), 0)
    assert first != dropped(examples, 1)
    assert first != dropped(read(wing, rows * 4, seed=1, caption_dropout=0.5), 0)
    some = examples.collate([3, 9], [0, 0]).content.prompts.hidden
    assert [not one.any() for one in some] == [first[3], first[9]]


def test_crop_and_flip_are_shared_by_the_pair(wing: Any) -> None:
    # Both images are the same strip; whatever is drawn, both sides must show the same part of it.
    strip = picture(7, 64, 16)
    rows = [{"prompt": "a cat", "chosen": strip, "rejected": strip} for _ in range(12)]
    how = {"crop": "random", "flip": True, "identical_pairs": "keep"}
    examples = read(wing, rows, **how)
    seen = set()
    for epoch in (0, 1):
        batch = everything(examples, epoch)
        for group in range(12):
            one, two = batch.content.latents[2 * group : 2 * group + 2]
            assert torch.equal(one, two)
            ids = batch.content.geometry[2 * group : 2 * group + 2]
            assert torch.equal(ids[0], ids[1])
            seen.add((epoch, float(ids[0, 3]), float(one.sum())))
    assert len({left for _, left, _ in seen}) > 8
    again = everything(read(wing, rows, **how), 1)
    assert all(
        torch.equal(a, b) for a, b in zip(again.content.latents, batch.content.latents, strict=True)
    )


def test_random_crops_have_the_same_share_on_other_sizes(wing: Any) -> None:
    rows = [{"prompt": "", "chosen": picture(1, 64, 16), "rejected": picture(2, 16 * 9, 16)}] * 6
    geometry = everything(read(wing, rows, crop="random")).content.geometry
    for group in range(6):
        one, two = geometry[2 * group, 3], geometry[2 * group + 1, 3]
        assert abs(one / 48 - two / 128) < 0.02
    assert len(geometry[:, 3].unique()) > 6


def test_flip_alone_has_two_variants_that_are_kept(rows: Rows) -> None:
    wing = build(make_pipeline(), adapter=LoRA(rank=2), **BUILD)
    count = []
    wing.policy.vae.encoder.register_forward_pre_hook(lambda _, a: count.append(len(a[0])))
    examples = read(wing, rows[:4], flip=True)
    for epoch in range(12):
        everything(examples, epoch)
    assert 8 < sum(count) <= 16


def test_optional_columns(wing: Any, rows: Rows) -> None:
    data = [
        {**rows[0], "weight": 2, "margin": "0.5"},
        {**rows[1], "p_chosen": 0.75},
        {**rows[2], "weight": "", "margin": None},
    ]
    batch = everything(read(wing, data))
    assert batch.weight.tolist() == [2, 1, 1]
    assert batch.target_margin.tolist() == [0.5, 0, 0]
    assert batch.p_chosen.tolist() == [1, 0.75, 1]


def pick_a_pic(labels: list[Any]) -> Rows:
    return [
        {
            "caption": "a red circle",
            "jpg_0": jpeg(2 * i),
            "jpg_1": jpeg(2 * i + 1, 30),
            "label_0": label,
            "label_1": 1 - label,
            "are_different": True,
        }
        for i, label in enumerate(labels)
    ]


def test_pick_a_pic_rows_are_oriented_by_their_label(wing: Any) -> None:
    batch = everything(read(wing, pick_a_pic([1, 0, 1.0])))
    originals = batch.content.geometry[:, 0].tolist()
    assert originals == [24, 30, 30, 24, 24, 30]
    only_other = [{k: v for k, v in row.items() if k != "label_0"} for row in pick_a_pic([0])]
    assert everything(read(wing, only_other)).content.geometry[:, 0].tolist() == [30, 24]


def test_ties_under_three_policies(wing: Any) -> None:
    rows = pick_a_pic([1, 0.5, 0])
    dropped = read(wing, rows)
    assert len(dropped) == 2 and dropped.skipped == {"tie": 1}
    assert everything(dropped).row_id.tolist() == [0, 2]
    assert everything(dropped).p_chosen is None
    half = read(wing, rows, ties="half")
    assert len(half) == 3 and half.skipped == {}
    batch = everything(half)
    assert batch.p_chosen.tolist() == [1, 0.5, 1]
    assert batch.rank.tolist() == [0, 1, 0, 0, 0, 1]
    with pytest.raises(DataError, match=r"Row 1 .*tie.*ties=\"drop\""):
        read(wing, rows, ties="error")


def test_identical_pairs_under_three_policies(wing: Any, rows: Rows) -> None:
    png = io.BytesIO()
    rows[1]["chosen"].save(png, "PNG")
    data = [rows[0], {**rows[1], "rejected": png.getvalue()}, rows[2]]
    skipped = read(wing, data)
    assert len(skipped) == 2 and skipped.skipped == {"chosen and rejected are the same": 1}
    kept = read(wing, data, identical_pairs="keep")
    assert len(kept) == 3 and kept.skipped == {}
    with pytest.raises(DataError, match=r"Row 1 .*are the same"):
        read(wing, data, identical_pairs="error")


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"chosen": "gone.png"}, "missing file", r"'chosen'.*gone\.png"),
    ({"rejected": jpeg(0, 64)[:-60]}, "unreadable image", "'rejected'.*truncated"),
    ({"chosen": b"text"}, "unreadable image", "not an image"),
    ({"chosen": None}, "no image", "got nothing"),
    ({"prompt": None}, "no prompt", "NoneType"),
    ({"prompt": 5}, "no prompt", "int"),
    ({"weight": -1}, "bad weight", "weight is a finite number of at least 0; got -1"),
    ({"weight": "nan"}, "bad weight", "nan"),
    ({"p_chosen": 1.5}, "bad p_chosen", "between 0 and 1; got 1.5"),
    ({"margin": "wide"}, "bad margin", "'wide'"),
]


@pytest.mark.parametrize(("change", "reason", "text"), BAD)
def test_bad_rows_under_both_policies(
    change: dict[str, Any], reason: str, text: str, wing: Any, rows: Rows
) -> None:
    data = [rows[0], {**rows[1], **change}, rows[2]]
    with pytest.raises(DataError, match=rf"Row 1 .*given list.*{text}.*on_bad_row"):
        read(wing, data)
    examples = read(wing, data, on_bad_row="skip")
    assert examples.skipped == {reason: 1}
    assert everything(examples).row_id.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"label_0": 0.7}, "0, 0.5 or 1"),
        ({"label_0": 1, "label_1": 1}, "add up"),
        ({"label_0": None, "label_1": None}, "neither"),
    ],
)
def test_bad_labels(change: dict[str, Any], text: str, wing: Any) -> None:
    data = pick_a_pic([1, 1])
    data[1].update(change)
    with pytest.raises(DataError, match=f"Row 1.*{text}"):
        read(wing, data)
    assert sum(read(wing, data, on_bad_row="skip").skipped.values()) == 1


def test_a_row_without_a_column_of_the_others(wing: Any, rows: Rows) -> None:
    data = [rows[0], {"prompt": "x", "chosen": rows[1]["chosen"]}]
    with pytest.raises(DataError, match=r"Row 1.*no column 'rejected'"):
        read(wing, data)


def test_missing_columns_are_named_with_the_nearest(wing: Any, rows: Rows) -> None:
    data = [{"prompt": "x", "chosen": rows[0]["chosen"], "rejcted": rows[0]["rejected"]}]
    with pytest.raises(DataError) as caught:
        read(wing, data)
    text = str(caught.value)
    assert "'rejected' is missing" in text and "Did you mean 'rejcted'?" in text
    assert "chosen, prompt, rejcted" in text
    with pytest.raises(DataError, match="'label_0' is missing"):
        read(wing, [{"caption": "x", "jpg_0": b"", "jpg_1": b""}])


def test_columns_are_renamed(wing: Any, rows: Rows) -> None:
    data = [{"text": r["prompt"], "win": r["chosen"], "lose": r["rejected"]} for r in rows]
    columns = {"prompt": "text", "chosen": "win", "rejected": "lose"}
    batch, plain = (everything(read(wing, d, columns=c)) for d, c in ((data, columns), (rows, {})))
    assert torch.equal(batch.content.geometry, plain.content.geometry)
    swapped = read(wing, rows, columns={"chosen": "rejected", "rejected": "chosen"})
    assert torch.equal(everything(swapped).content.geometry[0], plain.content.geometry[1])
    with pytest.raises(ConfigError, match=r"'chosne'.*Did you mean 'chosen'"):
        read(wing, rows, columns={"chosne": "win"})
    with pytest.raises(DataError, match=r"maps 'chosen' to 'wni'.*Did you mean 'win'"):
        read(wing, data, columns={**columns, "chosen": "wni"})


def test_places_on_disk(
    wing: Any, rows: Rows, image_folder: Callable[[Rows], Path], tmp_path: Path
) -> None:
    import datasets

    plain = everything(read(wing, rows))
    folder = image_folder(rows)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (tmp_path / "rows.json").write_text(json.dumps(lines))
    text = "prompt,chosen,rejected\n"
    text += "".join(f'"{r["prompt"]}",{r["chosen"]},{r["rejected"]}\n' for r in lines)
    (tmp_path / "rows.csv").write_text(text)
    features = datasets.Features(
        prompt=datasets.Value("string"), chosen=datasets.Image(), rejected=datasets.Image()
    )
    dataset = datasets.Dataset.from_list(rows, features=features)
    dataset.to_parquet(tmp_path / "rows.parquet")
    places: list[Any] = [folder, str(folder / "metadata.jsonl"), folder / "rows.json"]
    places += [folder / "rows.csv", folder / "rows.parquet", dataset, dataset.to_iterable_dataset()]
    for place in places:
        batch = everything(read(wing, place))
        assert torch.equal(batch.content.geometry, plain.content.geometry), place
        for found, expected in zip(batch.content.latents, plain.content.latents, strict=True):
            assert torch.allclose(found, expected, atol=1e-5)


def test_bad_rows_of_a_file_name_the_line(
    wing: Any, rows: Rows, image_folder: Callable[[Rows], Path]
) -> None:
    folder = image_folder([rows[0], {**rows[1], "chosen": "gone.png"}])
    with pytest.raises(DataError, match=r"Row 1 .*metadata\.jsonl, line 2.*'chosen'.*gone\.png"):
        read(wing, folder)


def test_nothing_usable(wing: Any, rows: Rows) -> None:
    with pytest.raises(DataError, match="at least one row"):
        read(wing, [])
    with pytest.raises(DataError, match=r"at least one usable row.*'tie': 1"):
        read(wing, pick_a_pic([0.5]))


def test_latents_that_are_not_finite_name_the_image(rows: Rows) -> None:
    wing = build(make_pipeline(), adapter=LoRA(rank=2), **BUILD)
    wing.policy.vae.quant_conv.weight.data.fill_(torch.nan)
    with pytest.raises(DataError, match=r"finite.*Row 0 .*'chosen'"):
        read(wing, rows[:2])


def test_embeddings_that_are_not_finite_name_the_prompt(rows: Rows) -> None:
    wing = build(make_pipeline(), adapter=LoRA(rank=2), **BUILD)
    token = wing.policy.tokenizer("house")["input_ids"][1]
    wing.policy.text_encoder.get_input_embeddings().weight.data[token] = torch.nan
    with pytest.raises(DataError, match=r"finite; 'a blue square on the house'.*text encoders"):
        read(wing, rows[:2])
    assert len(read(wing, rows[:1])) == 1


def test_an_image_that_changes_while_it_is_used(
    wing: Any, rows: Rows, image_folder: Callable[[Rows], Path]
) -> None:
    folder = image_folder(rows[:2])
    examples = read(wing, folder, crop="random")
    picture(99).save(folder / "chosen_0.png")
    with pytest.raises(DataError, match=r"'chosen' \(chosen_0\.png\).*changed"):
        examples.collate([0], [0])
    (folder / "chosen_0.png").unlink()
    with pytest.raises(DataError, match="no image file"):
        examples.collate([0], [0])


def test_long_prompts_are_warned_of_once(
    wing: Any, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    long = "a red circle on the big blue house " * 4
    with caplog.at_level(logging.WARNING):
        read(wing, [{**rows[0], "prompt": long}, {**rows[1], "prompt": long + "cat"}, rows[2]])
    assert [r.message for r in caplog.records if "longer" in r.message] == [
        "2 of 3 prompts are longer than the 16 tokens that the text encoders read; "
        "their ends are cut off."
    ]


def test_distinct_prompts(wing: Any, rows: Rows) -> None:
    found = wing.prompts(rows, None, 3)
    assert found == ["a red circle", "a blue square on the house", ""]
    assert len(wing.prompts(rows, None, 100)) == 4
    assert wing.prompts(pick_a_pic([1]), None, 5) == ["a red circle"]


def test_other_kinds_and_sizes_are_refused(wing: Any, rows: Rows) -> None:
    with pytest.raises(ConfigError, match=r"'pears'.*Did you mean 'pairs'"):
        wing.examples(rows, None, kind="pears", seed=0)
    with pytest.raises(ConfigError, match=r"multiple of 4 .*got 18. Take 16"):
        wing.examples(rows, ImageOptions(resolution=18), kind="pairs", seed=0)
    with pytest.raises(ConfigError, match="multiple of 4"):
        wing.prompts(rows, dataclasses.replace(wing.default_options, resolution=15), 1)


@pytest.mark.parametrize(("levels", "side"), [(1, 8), (2, 16), (3, 32)])
def test_the_vae_says_how_large_latents_are(levels: int, side: int, rows: Rows) -> None:
    wing = build(make_pipeline(vae_levels=levels), adapter=LoRA(rank=2), **BUILD)
    assert wing.default_options.resolution == side
    batch = everything(wing.examples(rows[:2], None, kind="pairs", seed=0))
    assert batch.content.latents[0].shape == (4, 8, 8)
    double = ImageOptions(resolution=2 * side)
    batch = everything(wing.examples(rows[:2], double, kind="pairs", seed=0))
    assert batch.content.latents[0].shape == (4, 16, 16)


def test_other_channel_counts(rows: Rows) -> None:
    wing = build(make_pipeline(latent_channels=3), adapter=LoRA(rank=2), **BUILD)
    batch = everything(read(wing, rows[:2]))
    found = wing.backend.module(batch, wing.backend.draw(batch, (0, 1)))
    assert batch.content.latents[0].shape == (3, 8, 8) and found.total.isfinite().all()
