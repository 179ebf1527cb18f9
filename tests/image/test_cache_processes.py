"""Processes that fill one cache together, and are killed while they do."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.options import ImageOptions, LoRA
from alignkit_diffusion import build
from alignkit_diffusion.autoencoder import Autoencoder
from alignkit_diffusion.cache import build as building
from alignkit_diffusion.cache import store as storing
from alignkit_diffusion.cache.store import Store
from tests.image.conftest import BUILD, picture

pytestmark = [
    pytest.mark.slow,
    # Children are forked, which saves them seconds of imports.
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]

Write = Callable[[list[dict[str, Any]]], Path]

ROWS, BLOCK, BATCH = 24, 4, 2


@pytest.fixture
def data(image_folder: Write) -> Path:
    return image_folder(
        [
            {
                "prompt": f"a {'red' if i % 2 else 'blue'} circle",
                "chosen": picture(2 * i, 18, 18),
                "rejected": picture(2 * i + 1, 16, 24),
            }
            for i in range(ROWS)
        ]
    )


def fill(pipeline: Path, data: Path, cache: Path, log: Path, pause: float) -> None:
    """A process that fills the cache, and notes each image that it encodes."""
    torch.set_num_threads(1)
    plain = Autoencoder.posterior

    def slowly(self: Autoencoder, pixels: torch.Tensor) -> Any:
        time.sleep(pause)
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n" * len(pixels))
        return plain(self, pixels)

    Autoencoder.posterior = slowly  # type: ignore[method-assign]
    Autoencoder.batch_size = lambda *_: BATCH  # type: ignore[method-assign]
    building.BLOCK = BLOCK
    storing.SHARD_BYTES = 1500  # a batch or two
    wing = build(str(pipeline), adapter=LoRA(rank=2), **BUILD)
    given = ImageOptions(resolution=16, cache=str(cache), cache_dtype="fp32")
    wing.examples(data, given, kind="pairs", seed=0)


def start(*arguments: Any) -> Any:
    child = multiprocessing.get_context("fork").Process(target=fill, args=arguments)
    child.start()
    return child


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def check_whole(pipeline: Path, data: Path, cache: Path) -> None:
    """The cache gives what encoding gives, without anything to encode with."""
    given = {"kind": "pairs", "seed": 0}
    wing = build(str(pipeline), adapter=LoRA(rank=2), **BUILD)
    options = ImageOptions(resolution=16, cache=str(cache), cache_dtype="fp32")
    cached = wing.examples(data, options, **given)
    assert cached._latents.encoded == 0
    plain = wing.examples(data, ImageOptions(resolution=16), **given)
    assert len(cached) == len(plain) == ROWS
    one, other = (each.collate(range(ROWS), [0] * ROWS) for each in (cached, plain))
    for a, b in zip(one.content.latents, other.content.latents, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert torch.allclose(one.content.prompts.hidden, other.content.prompts.hidden, atol=1e-5)
    for folder in (*cache.glob("latents-*"), *cache.glob("prompts-*")):
        assert Store(folder).verify() == 0
        assert not list(folder.glob("*.damaged"))


def test_killed_builders_go_on_where_they_were(
    pipeline_folder: Path, data: Path, tmp_path: Path
) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    kills = 0
    while True:
        before = len(lines(log))
        child = start(pipeline_folder, data, cache, log, 0.02)
        # Later each time, so that every stage of a block is met.
        while child.is_alive() and len(lines(log)) < before + 5 + 2 * kills:
            time.sleep(0.005)
        if not child.is_alive():
            break
        time.sleep(0.004 * kills)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
        assert kills < 40
    child.join()
    assert child.exitcode == 0 and kills >= 3
    # A kill costs what was not yet written: a shard's worth, and what was being encoded.
    assert 2 * ROWS <= len(lines(log)) <= 2 * ROWS + kills * 8
    check_whole(pipeline_folder, data, cache)


def test_builders_share_the_work(pipeline_folder: Path, data: Path, tmp_path: Path) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    children = [start(pipeline_folder, data, cache, log, 0.05) for _ in range(3)]
    # One dies in the middle of its block; the others take it over.
    while len(lines(log)) < 6:
        time.sleep(0.005)
    os.kill(children[0].pid, signal.SIGKILL)
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [-signal.SIGKILL, 0, 0]
    made = lines(log)
    assert 2 * ROWS <= len(made) <= 2 * ROWS + 8
    assert all(made.count(str(child.pid)) >= 2 * BLOCK for child in children[1:])
    check_whole(pipeline_folder, data, cache)
