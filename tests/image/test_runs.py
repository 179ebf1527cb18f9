"""Whole runs of the image wing: going on after an interruption, and evaluation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

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
        # Not to the bit: the tiny step before took its direction from augmented rows.
        same = plain[name] == pytest.approx(augmented[name], rel=1e-6)
        assert same == name.startswith("eval/"), name


OTHERS: dict[str, dict[str, Any]] = {
    "as SDXL is built": {
        "levels": 3,
        "layers": 2,
        "vae_levels": 4,
        "pooled": 28,
        "time_features": 12,
        "scheduler": "DPMSolverMultistepScheduler",
    },
    "v-prediction, convolutions, no VAE shrinking": {
        "prediction_type": "v_prediction",
        "linear_projection": False,
        "vae_levels": 1,
        "latent_channels": 3,
        "force_zeros": False,
        "scheduler": "DDIMScheduler",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, LoRA(rank=2, targets="all")], ids=["whole", "lora"])
@pytest.mark.parametrize("shape", OTHERS)
def test_pipelines_of_other_shapes(
    shape: str, adapter: LoRA | None, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """From a folder to a folder, whose pipeline draws the same pictures by itself."""
    from diffusers import DiffusionPipeline

    base = tmp_path / "base"
    make_pipeline(**OTHERS[shape]).save_pretrained(base)
    result = align(
        str(base),
        DPO(beta=500),
        rows,
        adapter=adapter,
        generation=GenerationOptions(steps=2),
        trainer=TrainerOptions(max_steps=3, batch_size=4, learning_rate=1e-2, precision="fp32"),
        run_dir=tmp_path / "run",
    )
    assert result.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert result.history[0]["rewards/margins"] == 0
    model = result.run_dir / "model"
    mine = DiffusionPipeline.from_pretrained(base if adapter else model)
    if adapter:
        mine.load_lora_weights(model)

    def draw(pipe: Any) -> np.ndarray:
        seeded = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": 2, "output_type": "np", "generator": seeded}
        return pipe("a red circle", **call).images

    assert np.allclose(draw(mine), draw(result.model), atol=1e-4)
    assert not np.allclose(draw(mine), draw(DiffusionPipeline.from_pretrained(base)), atol=1e-2)
