"""A reference evaluated once on a bank of draws against the same reference evaluated live."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit import DPO, KTO, ImageOptions, LoRA, NoiseBank, TrainerOptions, build
from alignkit.errors import ConfigError
from alignkit.reference import FrozenModel
from tests.faults.runs import assert_same_folder
from tests.image.conftest import make_pipeline
from tests.image.test_runs import go_on, start

FEW = TrainerOptions(max_steps=6, batch_size=4, micro_batch=2, learning_rate=1e-2, log_every=1)
PLAIN = ImageOptions()


def run_of(rows: list[dict[str, Any]], reference: Any, **given: Any) -> Any:
    given = {"adapter": LoRA(rank=2), "trainer": FEW, **given}
    return build(make_pipeline(), DPO(), rows, reference=reference, **given)


def test_a_row_has_as_many_draws_as_the_bank(rows: list[dict[str, Any]]) -> None:
    run = run_of(rows, NoiseBank(draws=3))
    seen: dict[int, set[tuple[int, float]]] = {}
    backend = run.wing.backend
    batch = run.trainer.source.examples.collate(range(8), [0] * 8)
    for step in range(1, 40):
        draw = backend.draw(batch, (0, step))
        for row, timestep, noise in zip(
            batch.row_id.tolist(), draw.timesteps.tolist(), draw.noise, strict=True
        ):
            seen.setdefault(row, set()).add((timestep, float(noise.sum())))
    assert {len(found) for found in seen.values()} == {3}
    assert len(set.union(*seen.values())) == 3 * 8
    assert backend.draw(batch, (0, 0)).numbers is None
    part = backend.draw(batch.select([5, 2]), (0, 7))
    whole = backend.draw(batch, (0, 7))
    assert part.timesteps.tolist() == whole.timesteps[[5, 2]].tolist()
    assert torch.equal(part.noise[0], whole.noise[5])


@pytest.mark.parametrize("adapter", [LoRA(rank=2), None], ids=["lora", "whole"])
def test_training_is_that_of_a_live_reference_on_the_same_draws(
    adapter: LoRA | None, rows: list[dict[str, Any]]
) -> None:
    """Up to rounding: the bank is filled in other micro-batches than it is used in."""
    banked = run_of(rows, NoiseBank(draws=2), adapter=adapter, eval_data=rows[:3])
    live = run_of(rows, "auto", adapter=adapter, eval_data=rows[:3])
    live.wing.backend.bank = 2
    calls: list[int] = []
    counted = lambda *_: calls.append(1)  # noqa: E731
    handle = banked.wing.policy.unet.register_forward_pre_hook(counted)
    for one, other in zip(banked.steps(), live.steps(), strict=True):
        assert one.loss == pytest.approx(other.loss, abs=2e-5)
    assert len(calls) == 6 * 2  # one forward of the policy on each of two micro-batches
    handle.remove()
    assert banked.history[0]["loss"] == pytest.approx(math.log(2), abs=2e-5)
    assert abs(banked.history[-1]["loss"] - math.log(2)) > 1e-3
    ours, theirs = banked.finish().metrics, live.finish().metrics
    assert ours["eval/rewards/margins"] == pytest.approx(theirs["eval/rewards/margins"], abs=1e-3)


def test_a_copy_is_let_go_once_the_bank_is_full(rows: list[dict[str, Any]]) -> None:
    assert run_of(rows, NoiseBank(), adapter=None).trainer.objective.reference.inner is None
    kept = run_of(rows, NoiseBank(), adapter=None, eval_data=rows[:2])
    assert isinstance(kept.trainer.objective.reference.inner, FrozenModel)


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    given = {"reference": NoiseBank(draws=2), "data_options": PLAIN, "eval_data": rows[:3]}
    go_on(start(rows, tmp_path / "one", **given))
    go_on(start(rows, tmp_path / "two", **given), until=3)
    go_on(start(rows, tmp_path / "two", **given))
    assert_same_folder(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"data_options": ImageOptions(flip=True)}, r"augmentation.*data_options\.flip=True"),
        ({"data_options": ImageOptions(crop="random")}, r"data_options\.crop='random'"),
        ({"data_options": ImageOptions(caption_dropout=0.1)}, "caption_dropout=0.1"),
        ({"data_options": ImageOptions(latents="sample")}, "latents='sample'"),
        ({"method": KTO()}, "precomputed reference knows nothing"),
        ({"policy": ("model", "tokenizer")}, "text has none"),
        ({"reference": NoiseBank(of="adapter_off"), "adapter": None}, "without its adapter"),
    ],
)
def test_what_a_bank_cannot_do_is_refused(given: dict[str, Any], text: str) -> None:
    arguments = {"policy": make_pipeline(), "method": DPO(), "reference": NoiseBank()} | given
    arguments = {"adapter": LoRA(rank=2), **arguments}
    with pytest.raises(ConfigError, match=text):
        build(arguments.pop("policy"), arguments.pop("method"), [], **arguments)


def test_a_bank_is_filled_from_a_reference_that_stands_still() -> None:
    for wrong in ("none", NoiseBank()):
        with pytest.raises(ConfigError, match="stands still"):
            NoiseBank(of=wrong)
