"""Mixtures of images: rows of several sets, read by their own columns and drawn by weight."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit import DPO, ConfigError, DataError, ImageOptions, LoRA, Mixture, TrainerOptions, align
from alignkit.caching import cache_images
from alignkit.options import ScoreLabels
from alignkit.sources import RowSource
from alignkit_diffusion import build
from tests.builders import ONE_PROCESS
from tests.image.conftest import BUILD, make_pipeline
from tests.image.test_cache import batch_of, equal

Rows = list[dict[str, Any]]
OPTIONS = ImageOptions(resolution=16, flip=True, caption_dropout=0.3)


@pytest.fixture
def sets(rows: Rows) -> tuple[Rows, Rows]:
    """Five pairs with chosen and rejected; three of Pick-a-Pic's columns, one of them a tie."""
    labels = (1, 0.5, 0)
    other = [
        {"caption": r["prompt"], "jpg_0": r["chosen"], "jpg_1": r["rejected"], "label_0": label}
        for r, label in zip(rows[5:], labels, strict=True)
    ]
    return rows[:5], other


def examples_of(data: Any, options: ImageOptions, policy: Any = None) -> Any:
    wing = build(policy or make_pipeline(), adapter=LoRA(rank=2), **BUILD)
    return wing.examples(data, options, kind="pairs", seed=0)


def test_each_set_is_read_by_its_own_columns(sets: tuple[Rows, Rows]) -> None:
    found = examples_of(Mixture([(sets[0], 3), (sets[1], 1)]), OPTIONS)
    assert [(part.name, part.size, part.weight) for part in found.parts] == [
        ("rows (0)", 5, 3),
        ("rows (1)", 2, 1),
    ]
    assert found.skipped == {"tie": 1}
    # Numbered on from set to set: no row shares its crop, its draws or its reference with another.
    assert batch_of(found).row_id.tolist() == [0, 1, 2, 3, 4, 5, 7]
    backwards = found.collate([6, 0, 5, 1], [1] * 4)
    assert backwards.row_id.tolist() == [7, 0, 5, 1]
    first, second = (examples_of(one, OPTIONS) for one in sets)
    # jpg_1 won in the last row, so that it comes first.
    plain = ImageOptions(resolution=16)
    mixed = examples_of(Mixture([(sets[0], 3), (sets[1], 1)]), plain)
    latents = mixed.collate([6, 0], [0, 0]).content.latents
    alone = examples_of(sets[1], plain).collate([1], [0]).content.latents
    assert all(torch.equal(a, b) for a, b in zip(latents[:2], alone, strict=True))
    both = backwards.content.prompts.hidden[[1, 3]], first.collate([0, 1], [1, 1])
    assert torch.equal(both[0], both[1].content.prompts.hidden)
    assert found.fingerprint() != first.fingerprint() != second.fingerprint()


def test_sets_are_drawn_by_their_weights(sets: tuple[Rows, Rows]) -> None:
    found = examples_of(Mixture([(sets[0], 1), (sets[1], 1)]), OPTIONS)
    source = RowSource(found, batch_size=2, epochs=4, seed=0, processes=ONE_PROCESS)
    drawn = Counter(row for batch in source for row in batch.row_id.tolist())
    assert sum(drawn.values()) == 28
    assert drawn[5] + drawn[7] == 12 and max(drawn[5], drawn[7]) == 6  # three of seven an epoch


@pytest.mark.slow
def test_a_mixture_trains_from_a_cache_as_without(
    sets: tuple[Rows, Rows], pipeline_folder: Path, tmp_path: Path
) -> None:
    mixture = Mixture([(sets[0], 2), (sets[1], 1)])
    cached = ImageOptions(resolution=16, cache=str(tmp_path / "cache"), cache_dtype="fp32")
    told = cache_images(str(pipeline_folder), mixture, data_options=cached)
    assert (told.rows, told.encoded, told.skipped) == (7, told.images, {"tie": 1})
    again = cache_images(str(pipeline_folder), mixture, data_options=cached)
    assert again.encoded == 0
    both = [
        examples_of(mixture, options, str(pipeline_folder))
        for options in (cached, ImageOptions(resolution=16))
    ]
    assert equal(*(batch_of(one) for one in both), 1e-5)
    result = align(
        str(pipeline_folder),
        DPO(),
        mixture,
        adapter=LoRA(rank=2),
        data_options=cached,
        trainer=TrainerOptions(batch_size=3, precision="fp32"),
        run_dir=tmp_path / "run",
    )
    assert len(result.history) == 3
    assert "rows (0): 5; rows (1): 2" in (tmp_path / "run/report.html").read_text()


@pytest.mark.slow
def test_held_out_rows_of_a_mixture_come_once_each(sets: tuple[Rows, Rows]) -> None:
    """Whatever the weights are, and also from a set of which nothing is held out."""
    mixture = Mixture([(sets[0], 1), (sets[1], 9)])
    result = align(
        make_pipeline(),
        DPO(),
        mixture,
        adapter=LoRA(rank=2),
        data_options=ImageOptions(resolution=16, held_out_share=0.5, eval_draws=1),
        eval_data="split",
        trainer=TrainerOptions(max_steps=1, batch_size=2, eval_every=1, precision="fp32"),
    )
    assert result.metrics["eval/rewards/accuracies"] in (0.0, 0.5, 1.0)


def test_what_a_mixture_cannot_be(sets: tuple[Rows, Rows]) -> None:
    tied = [{**sets[1][1]}]
    with pytest.raises(DataError, match=r"rows \(1\) has none. Left out: {'tie': 1}"):
        examples_of(Mixture([(sets[0], 1), (tied, 1)]), OPTIONS)
    labels = ScoreLabels(folder="scores", scorer="clip")
    with pytest.raises(ConfigError, match="the scores of one data set"):
        align(
            make_pipeline(),
            DPO(),
            Mixture([(sets[0], 1), (sets[1], 1)]),
            data_options=ImageOptions(labels=labels),
        )
