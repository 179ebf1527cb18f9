"""Whole runs of the image wing: going on after an interruption, and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignkit import DPO, GenerationOptions, ImageOptions, LoRA, TrainerOptions, align, build
from tests.faults.runs import assert_same_folder
from tests.image.conftest import make_pipeline

AUGMENTED = ImageOptions(crop="random", flip=True, caption_dropout=0.5)


def start(rows: list[dict[str, Any]], run_dir: Path | None, **changed: Any) -> Any:
    trainer: dict[str, Any] = {
        "max_steps": 6,
        "batch_size": 3,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "log_every": 4,
        "save_every": 2,
    }
    trainer |= {
        k: changed.pop(k) for k in list(changed) if k in TrainerOptions.__dataclass_fields__
    }
    given: dict[str, Any] = {
        "data_options": AUGMENTED,
        "generation": GenerationOptions(steps=1),
        "trainer": TrainerOptions(**trainer),
        "run_dir": run_dir,
    }
    return build(make_pipeline(), DPO(), rows, **(given | changed))


def go_on(run: Any, until: int | None = None) -> Any:
    """To the end, or as far as a kill after step `until` lets it."""
    for record in run.steps():
        if record.step == until:
            run.folder.unlock()
            return None
    return run.finish()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"adapter": LoRA(rank=2, kind="dora"), "precision": "bf16"},
    ],
    ids=["whole", "dora-bf16"],
)
def test_an_interrupted_run_ends_with_the_same_bits(
    changed: dict[str, Any], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Crop, flip, caption dropout, timestep and noise need no saved generator; the reference is
    taken anew from the pipeline in hand."""
    given = {"eval_data": rows[:3], "eval_every": 3, "sample_every": 3} | changed
    go_on(start(rows, tmp_path / "one", **given))
    for stop in (3, 5):
        go_on(start(rows, tmp_path / "two", **given), until=stop)
    go_on(start(rows, tmp_path / "two", **given))
    assert_same_folder(tmp_path / "two", tmp_path / "one")


def test_held_out_rows_are_not_augmented(rows: list[dict[str, Any]]) -> None:
    """Crops, flips and lost captions are of training; a held-out value does not depend on them."""

    def held_out(options: ImageOptions) -> dict[str, float]:
        trainer = TrainerOptions(
            max_steps=1, batch_size=4, learning_rate=1e-12, precision="fp32", eval_every=1
        )
        line = align(
            make_pipeline(),
            DPO(),
            rows,
            eval_data=rows[:4],
            data_options=options,
            adapter=LoRA(rank=2),
            trainer=trainer,
        ).history[0]
        assert {k for k in line if k.startswith("eval/logps")}
        return {k: v for k, v in line.items() if "logps" in k}

    plain, augmented = held_out(ImageOptions()), held_out(AUGMENTED)
    for name in plain:
        assert (plain[name] == augmented[name]) == name.startswith("eval/"), name
