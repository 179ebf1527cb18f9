"""Shapes: the published list, one shape for a pair, and micro-batches of one shape each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.options import ImageOptions, LoRA
from alignkit_diffusion import build
from alignkit_diffusion.buckets import bucket_list, nearest_bucket
from alignkit_diffusion.geometry import checked
from tests.image.conftest import BUILD, make_pipeline, picture

# Podell et al. 2023, appendix I: heights, each with its widths.
PUBLISHED = {
    512: (2048, 1984, 1920, 1856),
    576: (1792, 1728, 1664),
    640: (1600, 1536),
    704: (1472, 1408, 1344),
    768: (1344, 1280),
    832: (1216, 1152),
    896: (1152, 1088),
    960: (1088, 1024),
    1024: (1024, 960),
    1088: (960, 896),
    1152: (896, 832),
    1216: (832,),
    1280: (768,),
    1344: (768,),
    1408: (704,),
    1472: (704,),
    1536: (640,),
    1600: (640,),
    1664: (576,),
    1728: (576,),
    1792: (576,),
    1856: (512,),
    1920: (512,),
    1984: (512,),
    2048: (512,),
}


def test_the_rule_gives_sdxls_list() -> None:
    published = {(height, width) for height, widths in PUBLISHED.items() for width in widths}
    assert set(bucket_list(1024, 64)) - published == {(1344, 704)}
    assert published <= set(bucket_list(1024, 64))


def test_a_group_takes_the_bucket_of_its_mean_log_aspect() -> None:
    buckets = bucket_list(1024, 64)
    assert nearest_bucket([(768, 1344)], buckets) == (768, 1344)
    assert nearest_bucket([(1536, 2688)], buckets) == (768, 1344)
    # 2:1 and 1:2 cancel out, whichever is the chosen one.
    pair = [(1000, 500), (500, 1000)]
    assert nearest_bucket(pair, buckets) == nearest_bucket(pair[::-1], buckets) == (1024, 1024)
    # 1:1 and 4:1: the mean of the logs is 2:1.
    assert nearest_bucket([(512, 512), (1024, 256)], buckets) == (1408, 704)


@pytest.fixture(scope="module")
def wing() -> Any:
    return build(make_pipeline(), adapter=LoRA(rank=2), **BUILD)


def test_images_of_a_row_share_a_shape_and_keep_their_sizes(wing: Any) -> None:
    sizes = [((64, 32), (60, 30)), ((30, 60), (33, 66)), ((40, 40), (20, 20)), ((64, 16), (16, 16))]
    rows = [
        {"prompt": "a cat", "chosen": picture(2 * i, *one), "rejected": picture(2 * i + 1, *two)}
        for i, (one, two) in enumerate(sizes)
    ]
    options = ImageOptions(resolution=32, buckets=True, bucket_step=4)
    batch = wing.examples(rows, options, kind="pairs", seed=0).collate(range(4), [0] * 4)
    shapes = [tuple(latents.shape[1:]) for latents in batch.content.latents]
    assert shapes[0::2] == shapes[1::2]
    assert len(set(shapes)) == 3 and shapes[2 * 2] == (16, 16)
    # 4:1 beside 1:1 is 2:1, as the first row is; the pictures are wide, so the latents are.
    assert shapes[0] == shapes[6] and shapes[0][1] > shapes[0][0]
    geometry = batch.content.geometry
    for group, pair in enumerate(sizes):
        for side, (width, height) in enumerate(pair):
            row = geometry[2 * group + side].tolist()
            target = [2 * side for side in shapes[2 * group]]
            assert row[:2] == [height, width] and row[4:] == target


def test_micro_batches_have_one_shape_and_change_no_draw(wing: Any) -> None:
    rows = [
        {"prompt": "a cat", "chosen": picture(2 * i, *size), "rejected": picture(2 * i + 1, *size)}
        for i, size in enumerate([(64, 32), (32, 32), (64, 32), (32, 64), (32, 32)])
    ]
    options = ImageOptions(resolution=32, buckets=True, bucket_step=4)
    batch = wing.examples(rows, options, kind="pairs", seed=0).collate(range(5), [0] * 5)
    pieces = wing.backend.split(batch, 8)
    assert [piece.position.tolist() for piece in pieces] == [[0, 2], [1, 4], [3]]
    whole = wing.backend.draw(batch, (0, 1))
    for piece in pieces:
        assert len({latents.shape for latents in piece.content.latents}) == 1
        draw = wing.backend.draw(piece, (0, 1))
        for group, position in enumerate(piece.position.tolist()):
            assert draw.timesteps[group] == whole.timesteps[position]
            assert torch.equal(draw.noise[group], whole.noise[position])


def test_bucket_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"bucket_step.*multiple of 32.*got 48.*Take 64"):
        checked(ImageOptions(buckets=True, bucket_step=48), 1024, 32)
    with pytest.raises(ConfigError, match=r"no shape of about 32 x 32.*smaller bucket_step"):
        checked(ImageOptions(buckets=True, resolution=32), 1024, 32)
    assert checked(ImageOptions(buckets=True), 1024, 32).resolution == 1024
