"""Held-out rows of images: a fixed bank of draws, metrics by timestep, and errors that drift."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignkit import DPO, GenerationOptions, ImageOptions, LoRA, TrainerOptions, build
from alignkit.bank import Repeated
from alignkit.capabilities import DrawsInStrata
from alignkit.draws import generator
from alignkit.losses import PairScores
from alignkit.sources import RowSource
from alignkit_diffusion import build as build_wing
from tests.builders import ONE_PROCESS, TableExamples, text_wing
from tests.image.conftest import BUILD, make_pipeline

BUCKETS = ("t0-250", "t250-500", "t500-750", "t750-1000")


def one_by_one(wing: Any, rows: list[dict[str, Any]], seed: int) -> dict[str, float]:
    """The metrics again, image by image, with draws made here from the documented key."""
    examples = wing.examples(rows, ImageOptions(), kind="pairs", seed=seed)
    unet, schedule = wing.policy.unet, wing.backend.family.schedule
    errors = np.zeros((len(rows), 4, 2, 2))  # row, draw, chosen or rejected, policy or reference
    for row in range(len(rows)):
        batch = examples.collate([row], [0])
        for draw in range(4):
            position = 4 * row + draw
            low, high = 250 * draw, 250 * (draw + 1)
            t = int(generator("timestep", seed, 0, position).integers(low, high))
            assert low <= t < high
            for side in (0, 1):
                latents = batch.content.latents[side][None]
                noise = generator("noise", seed, 0, position).standard_normal(
                    latents.shape[1:], dtype="float32"
                )
                noise = torch.from_numpy(noise)[None]
                abar = schedule.alphas_cumprod[t]
                noised = (abar.sqrt() * latents + (1 - abar).sqrt() * noise).float()
                one = torch.zeros(1, dtype=torch.int64)
                content = batch.content.select([0], [side])
                conditioning = wing.backend.family.conditioning(content, one, torch.device("cpu"))

                def error(noised=noised, t=t, noise=noise, conditioning=conditioning) -> float:
                    with torch.no_grad():
                        said = unet(
                            noised,
                            torch.tensor([t]),
                            encoder_hidden_states=conditioning["hidden"],
                            added_cond_kwargs={
                                "text_embeds": conditioning["pooled"],
                                "time_ids": conditioning["time_ids"],
                            },
                        ).sample
                    return float((said.double() - noise.double()).square().mean())

                errors[row, draw, side, 0] = error()
                with wing.adapters_off():
                    errors[row, draw, side, 1] = error()
    drift = errors[..., 0] - errors[..., 1]  # (rows, draws, 2)
    right = drift[..., 0] < drift[..., 1]
    found = {f"accuracy/{name}": right[:, place].mean() for place, name in enumerate(BUCKETS)}
    found["rewards/accuracies"] = right.mean()
    found["error/chosen"], found["error/rejected"] = drift.mean(axis=(0, 1))
    return found


def test_held_out_metrics_are_those_of_a_fixed_bank(rows: list[dict[str, Any]]) -> None:
    """Two named sets; every row once in each quarter of the timesteps, at each evaluation."""
    trainer = TrainerOptions(
        max_steps=2, batch_size=4, learning_rate=3e-2, precision="fp32", eval_every=1, micro_batch=3
    )
    run = build(
        make_pipeline(),
        DPO(),
        rows[:4],
        eval_data={"few": rows[:2], "more": rows[3:8]},
        adapter=LoRA(rank=2),
        trainer=trainer,
        seed=5,
    )
    records = list(run.steps())
    for name, held_out in (("few", rows[:2]), ("more", rows[3:8])):
        run.wing.engage()
        expected = one_by_one(run.wing, held_out, seed=5)
        told = records[-1].metrics
        for metric, value in expected.items():
            assert told[f"eval/{name}/{metric}"] == pytest.approx(value, rel=2e-3, abs=1e-7), metric
        assert told[f"eval/{name}/error/chosen"] != 0
    run.wing.release()
    assert "accuracy/t0-250" not in records[-1].metrics, "training draws are not stratified"


def test_rows_that_are_repeated_stand_next_to_one_another() -> None:
    inner = TableExamples(3)
    source = RowSource(
        Repeated(inner, 4), batch_size=5, epochs=1, seed=0, processes=ONE_PROCESS, shuffle=False
    )
    rows = [row for batch in source.once() for row in batch.row_id.tolist()]
    assert rows == [0] * 4 + [1] * 4 + [2] * 4


def test_strata_are_quarters_and_training_draws_have_none(rows: list[dict[str, Any]]) -> None:
    wing = build_wing(make_pipeline(), adapter=None, **BUILD)
    assert isinstance(wing.backend, DrawsInStrata) and wing.backend.error_scale == -2
    assert not isinstance(text_wing().backend, DrawsInStrata)
    batch = wing.examples(rows, ImageOptions(), kind="pairs", seed=0).collate(range(8), [0] * 8)
    names, place = wing.backend.strata(batch, (0, 0))
    assert names == BUCKETS and place.tolist() == [0, 1, 2, 3] * 2
    drawn = wing.backend.draw(batch, (0, 0)).timesteps
    assert (drawn // 250).tolist() == place.tolist()
    drawn = [wing.backend.draw(batch, (0, step)).timesteps for step in range(1, 60)]
    whole = torch.cat(drawn)
    quarters = torch.bincount(whole // 250, minlength=4) / len(whole)
    assert (quarters - 0.25).abs().max() < 0.08
    first = torch.stack(drawn)[:, 0]
    assert len(set((first // 250).tolist())) == 4, "a position has no stratum of its own"


@pytest.mark.slow
def test_a_winner_that_gets_worse_raises_the_alarm_while_it_trains(
    rows: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(scores: PairScores, *, beta: float) -> torch.Tensor:
        """Makes chosen pictures ever less likely."""
        return beta * scores.chosen

    run = build(
        make_pipeline(),
        DPO(spoil),
        rows[:4],
        eval_data=rows[:4],
        data_options=ImageOptions(eval_draws=2),
        trainer=TrainerOptions(
            max_steps=5, batch_size=4, learning_rate=3e-3, precision="fp32", eval_every=1
        ),
        generation=GenerationOptions(steps=1),
        run_dir=tmp_path,
    )
    with caplog.at_level(logging.WARNING, "alignkit"):
        for _ in run.steps():
            pass
    result = run.finish()
    curve = [line["eval/error/chosen"] for line in result.history]
    assert curve[-1] > curve[-2] > curve[-3] > curve[-4] > 0
    alarms = [r.message for r in caplog.records if "The winner gets worse" in r.message]
    assert len(alarms) == 1 and "Step" in alarms[0]
    assert "The winner gets worse: eval/error/chosen" in (tmp_path / "report.html").read_text()
