"""Training from a cache: the same numbers, and neither VAE nor text encoders."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from alignkit import DPO, LoRA, TrainerOptions, align
from alignkit.cli import app
from alignkit.errors import ConfigError, DataError
from alignkit.options import ImageOptions, ScoreLabels
from alignkit_diffusion import build, caching
from alignkit_diffusion.autoencoder import Autoencoder
from alignkit_diffusion.cache import build as building
from alignkit_diffusion.unloaded import is_shell
from tests.image.conftest import BUILD, make_pipeline, picture
from tests.image.test_store import flip_a_bit

Rows = list[dict[str, Any]]
Write = Callable[[Rows], Path]


def options(folder: Path, **changes: Any) -> ImageOptions:
    return ImageOptions(resolution=16, cache=str(folder), cache_dtype="fp32", **changes)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of a VAE's encoder took."""
    counts: list[int] = []
    plain = Autoencoder.posterior

    def counting(self: Autoencoder, pixels: torch.Tensor) -> Any:
        counts.append(len(pixels))
        return plain(self, pixels)

    monkeypatch.setattr(Autoencoder, "posterior", counting)
    return counts


def read(policy: Any, data: Any, given: ImageOptions, seed: int = 0) -> tuple[Any, Any]:
    wing = build(policy, adapter=LoRA(rank=2), **BUILD)
    return wing, wing.examples(data, given, kind="pairs", seed=seed)


def batch_of(examples: Any, epoch: int = 0) -> Any:
    return examples.collate(range(len(examples)), [epoch] * len(examples))


def equal(one: Any, other: Any, tolerance: float = 0.0) -> bool:
    pairs = [*zip(one.content.latents, other.content.latents, strict=True)]
    pairs += [(one.content.prompts.hidden, other.content.prompts.hidden)]
    pairs += [(one.content.prompts.pooled, other.content.prompts.pooled)]
    close = all(torch.allclose(a.float(), b.float(), atol=tolerance, rtol=0) for a, b in pairs)
    return close and torch.equal(one.content.geometry, other.content.geometry)


def shells(wing: Any) -> list[bool]:
    parts = (wing._loaded.parts.vae, wing._pipe.text_encoder, wing._pipe.text_encoder_2)
    return [is_shell(part) for part in parts]


HOW = [{}, {"flip": True, "latents": "sample"}, {"buckets": True, "bucket_step": 4}]


@pytest.mark.parametrize("how", HOW)
def test_cached_and_uncached_agree(
    how: dict[str, Any], pipeline_folder: Path, rows: Rows, image_folder: Write, tmp_path: Path
) -> None:
    data = image_folder([{**rows[0], "weight": 2.0}, *rows[1:]])
    given = options(tmp_path / "cache", caption_dropout=0.3, **how)
    plain = ImageOptions(resolution=16, caption_dropout=0.3, **how)
    wing, examples = read(str(pipeline_folder), data, given)
    assert shells(wing) == [False] * 3
    again, cached = read(str(pipeline_folder), data, given)
    assert shells(again) == [True] * 3
    _, uncached = read(str(pipeline_folder), data, plain)
    for epoch in range(2):
        expected = batch_of(uncached, epoch)
        for found in (batch_of(examples, epoch), batch_of(cached, epoch)):
            assert equal(found, expected, 1e-5)
            assert found.row_id.tolist() == expected.row_id.tolist()
            assert torch.equal(found.weight, expected.weight)
    assert shells(again) == [True] * 3


def test_half_precision_is_within_its_rounding(
    pipeline_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    given = ImageOptions(resolution=16, cache=str(tmp_path))
    _, examples = read(str(pipeline_folder), rows, given)
    _, plain = read(str(pipeline_folder), rows, ImageOptions(resolution=16))
    assert equal(batch_of(examples), batch_of(plain), 4e-3)
    assert not equal(batch_of(examples), batch_of(plain))


def test_a_run_from_the_cache_never_loads_what_it_does_not_need(
    pipeline_folder: Path, rows: Rows, image_folder: Write, tmp_path: Path
) -> None:
    data = image_folder(rows)
    given = options(tmp_path / "cache")
    read(str(pipeline_folder), data, given)
    # Without their weights on disk, they cannot be loaded.
    bare = tmp_path / "bare"
    for path in pipeline_folder.rglob("*"):
        if path.is_file():
            target = bare / path.relative_to(pipeline_folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)
    from alignkit import build as build_run

    trainer = TrainerOptions(max_steps=2, batch_size=4)
    run = build_run(
        str(bare), DPO(), data, adapter=LoRA(rank=2), data_options=given, trainer=trainer
    )
    records = list(run.steps())
    assert len(records) == 2 and shells(run.wing) == [True] * 3
    result = run.finish()
    assert not any(is_shell(part) for part in (result.model.vae, result.model.text_encoder))
    image = result.model("a cat", num_inference_steps=1, height=16, width=16, output_type="np")
    assert image.images.shape == (1, 16, 16, 3)


def test_what_is_there_is_not_encoded_again(
    pipeline_folder: Path, rows: Rows, tmp_path: Path, encoded: list[int]
) -> None:
    given = options(tmp_path)
    read(str(pipeline_folder), rows[:5], given)
    assert sum(encoded) == 10
    read(str(pipeline_folder), rows, given)
    assert sum(encoded) == 16
    # Other options of reading, other data, the sides exchanged: the same images.
    swapped = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    read(str(pipeline_folder), swapped, options(tmp_path, ties="half", caption_dropout=0.5), 7)
    read(make_pipeline(), rows, given)
    assert sum(encoded) == 16
    # The mean alone does for the mean; its spread is another thing.
    read(str(pipeline_folder), rows[:2], options(tmp_path, latents="sample"))
    assert sum(encoded) == 20
    read(str(pipeline_folder), rows[:2], options(tmp_path, flip=True))
    assert sum(encoded) == 24
    other = make_pipeline()
    with torch.no_grad():
        other.vae.quant_conv.bias += 0.5
    read(other, rows[:1], given)
    assert sum(encoded) == 26


def test_a_changed_image_is_noticed_and_encoded_alone(
    pipeline_folder: Path, rows: Rows, image_folder: Write, tmp_path: Path, encoded: list[int]
) -> None:
    data = image_folder(rows)
    given = options(tmp_path / "cache")
    read(str(pipeline_folder), data, given)
    picture(99, 24, 20).save(data / "chosen_3.png")
    encoded.clear()
    _, examples = read(str(pipeline_folder), data, given)
    _, plain = read(str(pipeline_folder), data, ImageOptions(resolution=16))
    assert encoded[0] == 1 and equal(batch_of(examples), batch_of(plain), 1e-5)


def latent_shards(cache: Path) -> list[Path]:
    found = cache.glob("latents-*/*.safetensors")
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def test_a_lost_shard_is_made_again_and_nothing_else(
    pipeline_folder: Path,
    rows: Rows,
    image_folder: Write,
    tmp_path: Path,
    encoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(building, "BLOCK", 3)
    data = image_folder(rows)
    given = options(tmp_path / "cache")
    _, first = read(str(pipeline_folder), data, given)
    expected = batch_of(first)
    assert sum(encoded) == 16 and len(latent_shards(tmp_path / "cache")) == 3
    latent_shards(tmp_path / "cache")[1].unlink()
    encoded.clear()
    _, again = read(str(pipeline_folder), data, given)
    assert sum(encoded) == 6 and equal(batch_of(again), expected, 1e-5)
    encoded.clear()
    wing, _ = read(str(pipeline_folder), data, given)
    assert not encoded and shells(wing) == [True] * 3
    next((tmp_path / "cache").glob("prompts-*/*.safetensors")).unlink()
    wing, again = read(str(pipeline_folder), data, given)
    assert not encoded and shells(wing) == [True, False, False]
    assert equal(batch_of(again), expected, 1e-5)


def test_damage_met_in_training_is_mended(
    pipeline_folder: Path,
    rows: Rows,
    image_folder: Write,
    tmp_path: Path,
    encoded: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = image_folder(rows)
    given = options(tmp_path / "cache")
    _, first = read(str(pipeline_folder), data, given)
    expected = batch_of(first)
    flip_a_bit(latent_shards(tmp_path / "cache")[0])
    flip_a_bit(next((tmp_path / "cache").glob("prompts-*/*.safetensors")), "0.hidden")
    encoded.clear()
    wing, again = read(str(pipeline_folder), data, given)
    assert not encoded and shells(wing) == [True] * 3
    assert equal(batch_of(again), expected, 1e-5)
    assert sum(encoded) == 1 and "is damaged" in caplog.text
    encoded.clear()
    _, third = read(str(pipeline_folder), data, given)
    assert equal(batch_of(third), expected, 1e-5) and not encoded


def test_a_disk_that_fills_at_any_moment_harms_nothing(
    pipeline_folder: Path,
    rows: Rows,
    image_folder: Write,
    tmp_path: Path,
    encoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Full from the n-th write on, for each n until there are no more writes: the same call, told
    to come again, ends with what an undisturbed one has, and encodes no image twice."""
    monkeypatch.setattr(building, "BLOCK", 4)
    data, plain = image_folder(rows), os.fsync
    left = 0

    def filling(handle: int) -> None:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= 1
        plain(handle)

    monkeypatch.setattr(os, "fsync", filling)
    wing, expected = read(str(pipeline_folder), data, ImageOptions(resolution=16))
    encoded.clear()
    refused, given = 0, options(tmp_path / "cache")
    while True:
        left = 1 + refused  # a file is one write, and the entry in its folder another one
        try:
            examples = wing.examples(data, given, kind="pairs", seed=0)
            break
        except DataError as error:
            refused += 1
            assert "No space left" in str(error) and "it goes on where it stopped" in str(error)
            assert refused < 30
    assert refused >= 4 and equal(batch_of(examples), batch_of(expected), 1e-5)
    assert sum(encoded) <= 16 + 8  # a block whose shard could not be written is encoded again
    assert not list((tmp_path / "cache").rglob(".alignkit-tmp-*"))


def test_random_crops_stay_in_memory_and_prompts_are_kept(
    pipeline_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    given = options(tmp_path, crop="random")
    _, examples = read(str(pipeline_folder), rows, given)
    _, plain = read(str(pipeline_folder), rows, ImageOptions(resolution=16, crop="random"))
    assert equal(batch_of(examples, 1), batch_of(plain, 1), 1e-5)
    assert not latent_shards(tmp_path) and list(tmp_path.glob("prompts-*/*.safetensors"))


def test_rows_are_left_out_and_split_as_without_a_cache(
    pipeline_folder: Path, rows: Rows, image_folder: Write, tmp_path: Path
) -> None:
    tied = {"caption": "cat", "jpg_0": picture(70), "jpg_1": picture(71), "label_0": 0.5}
    data = image_folder([*rows, tied, {**rows[0], "rejected": rows[0]["chosen"]}])
    how = {"held_out_share": 0.6}
    for part in ("train", "held_out"):
        given = options(tmp_path / "cache", part=part, **how)
        _, cached = read(str(pipeline_folder), data, given)
        _, plain = read(str(pipeline_folder), data, ImageOptions(resolution=16, part=part, **how))
        assert batch_of(cached).row_id.tolist() == batch_of(plain).row_id.tolist()
        assert len(cached) not in (0, 8)
    assert cached.skipped.keys() >= {"tie"}
    assert len(list((tmp_path / "cache" / "jobs").iterdir())) == 1


def test_errors_name_the_row_and_leave_what_was_done(
    pipeline_folder: Path,
    rows: Rows,
    image_folder: Write,
    tmp_path: Path,
    encoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(building, "BLOCK", 2)
    data = image_folder(rows)
    (data / "chosen_5.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"Row 5 .*chosen_5\.png"):
        read(str(pipeline_folder), data, options(tmp_path / "cache"))
    assert sum(encoded) >= 8
    before = sum(encoded)
    picture(10, 33, 17).save(data / "chosen_5.png")
    read(str(pipeline_folder), data, options(tmp_path / "cache"))
    assert sum(encoded) == 16 and before < 16


def test_the_command_fills_mends_and_loads_no_unet(
    pipeline_folder: Path,
    rows: Rows,
    image_folder: Write,
    tmp_path: Path,
    encoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = []
    plain = caching.load_policy
    monkeypatch.setattr(
        caching, "load_policy", lambda *a, **k: loaded.append(plain(*a, **k)) or loaded[-1]
    )
    data, cache = image_folder(rows), tmp_path / "cache"
    command = ["cache", "images", str(data), "--model", str(pipeline_folder)]
    command += ["--folder", str(cache), "data_options.resolution=16"]
    command += ["data_options.cache_dtype=fp32"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert "rows: 8\nimages: 16\nprompts: 4\nencoded: 16\ndamaged: 0" in first.output
    assert is_shell(loaded[0].pipe.unet) and sum(encoded) == 16
    flip_a_bit(latent_shards(cache)[0])
    again = CliRunner().invoke(app, command)
    assert "encoded: 0\ndamaged: 0" in again.output
    mended = CliRunner().invoke(app, [*command, "--verify"])
    assert "encoded: 1\ndamaged: 1" in mended.output
    encoded.clear()
    wing, examples = read(str(pipeline_folder), data, options(cache))
    assert not encoded and shells(wing) == [True] * 3
    _, uncached = read(str(pipeline_folder), data, ImageOptions(resolution=16))
    assert equal(batch_of(examples), batch_of(uncached), 1e-5)
    missing = CliRunner().invoke(app, command[:3])
    assert missing.exit_code == 2 and "--model PIPELINE" in missing.output


def test_the_command_reads_the_rows_of_the_files_method(
    pipeline_folder: Path, image_folder: Write, tmp_path: Path
) -> None:
    data = image_folder([{"prompt": "a cat", "image": picture(1)}])
    file = tmp_path / "run.yaml"
    file.write_text(f"policy: {pipeline_folder}\nmethod: sft\ndata: {data}\n")
    command = ["cache", "images", str(file), "--folder", str(tmp_path / "cache")]
    found = CliRunner().invoke(app, [*command, "data_options.resolution=16"])
    assert found.exit_code == 0 and "rows: 1\nimages: 1" in found.output, found.output


def test_options_that_would_do_nothing_are_refused(rows: Rows) -> None:
    with pytest.raises(ConfigError, match=r"bucket_step=32 without them. Add buckets=True"):
        ImageOptions(bucket_step=32)
    with pytest.raises(ConfigError, match=r"temperature=2.0 without it. Add soft=True"):
        ScoreLabels(folder="scores", scorer="clip", temperature=2.0)
    with pytest.raises(ConfigError, match=r"cache_dtype='fp32'. Give cache a folder"):
        align(make_pipeline(), DPO(), rows, data_options=ImageOptions(cache_dtype="fp32"))


@pytest.mark.slow  # imports datasets
def test_a_stream_is_read_once_and_never_held(
    pipeline_folder: Path, rows: Rows, tmp_path: Path, encoded: list[int]
) -> None:
    import datasets

    seen = []

    def rows_as_bytes() -> Any:
        for number, row in enumerate(rows):
            seen.append(number)
            images = {}
            for name in ("chosen", "rejected"):
                buffer = io.BytesIO()
                row[name].save(buffer, "PNG")
                images[name] = buffer.getvalue()
            yield {"prompt": row["prompt"], **images}

    stream = datasets.IterableDataset.from_generator(rows_as_bytes)
    _, examples = read(str(pipeline_folder), stream, options(tmp_path))
    assert seen == list(range(8)) and sum(encoded) == 16
    _, plain = read(str(pipeline_folder), rows, ImageOptions(resolution=16))
    assert equal(batch_of(examples), batch_of(plain), 1e-5)
    for path in latent_shards(tmp_path):
        path.unlink()
    with pytest.raises(DataError, match="does not go back"):
        batch_of(examples)


@pytest.mark.slow
def test_evaluation_by_the_split_reads_one_job(
    pipeline_folder: Path, rows: Rows, image_folder: Write, tmp_path: Path
) -> None:
    data = image_folder(rows * 2)
    result = align(
        str(pipeline_folder),
        DPO(),
        str(data),
        eval_data="split",
        adapter=LoRA(rank=2),
        data_options=options(tmp_path / "cache", held_out_share=0.6),
        trainer=TrainerOptions(max_steps=1, batch_size=2, eval_every=1),
        run_dir=tmp_path / "run",
    )
    assert "eval/rewards/accuracies" in result.metrics
    assert len(list((tmp_path / "cache" / "jobs").iterdir())) == 1
    told = json.loads(next((tmp_path / "cache").glob("latents-*/about.json")).read_text())
    assert told["dtype"] == "fp32"
