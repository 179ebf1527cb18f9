"""The invariants of Diffusion-DPO that must hold whatever else changes, each by its number.

Some live by the code they are about: `ELSEWHERE` names those.

     1  the loss before the first update is ln 2
     2  goldens, and the gradient identity
     3  swapped labels flip the logit's sign
     4  the loss of a batch is the mean of its rows'
     5  one draw for a pair, other ones elsewhere
     6  errors are reduced in float32
     7  ties by an explicit rule, counted
     8  crop, flip and caption dropout shared by a pair
     9  true time ids per image, sizes mixed
    10  training, resuming and averages leave the reference as it was
    11  N steps = k, an interruption, N - k; with the same adapter
    12  exported adapters predict the same
    13  adapters switch under compile and under checkpointing
    14  latents of the cache are those that the pipeline encodes
    15  preferences are learned, on draws and pictures of their own
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit import DPO, GenerationOptions, LoRA, TrainerOptions, build
from alignkit.adapters import adapters_off
from alignkit_diffusion import build as build_wing
from tests.image import (
    test_buckets,
    test_data,
    test_layouts,
    test_likelihood,
    test_lora,
    test_runs,
)
from tests.image.conftest import BUILD, make_pipeline

BETA = 5000.0


def run_of(rows: Any, *, adapter: LoRA | None, loss: str = "sigmoid", **trainer: Any) -> Any:
    options = {"max_steps": 1, "batch_size": 4, "learning_rate": 1e-3, "log_every": 1, **trainer}
    return build(
        make_pipeline(), DPO(loss), rows, adapter=adapter, trainer=TrainerOptions(**options)
    )


def logits(run: Any, rows: list[int]) -> torch.Tensor:
    """Of the given rows, at places of their own: a row's draw is the same in any selection."""
    batch = run.trainer.source.examples.collate(rows, [0] * len(rows))
    object.__setattr__(batch, "position", torch.tensor(rows))
    found = []
    for micro in run.trainer.objective.micro_batches(batch, 1):
        with torch.no_grad():
            found.append(BETA * run.trainer.objective.scores(micro).margin)
    return torch.cat(found)


def trained(rows: Any) -> Any:
    run = run_of(rows, adapter=LoRA(rank=2), max_steps=3)
    list(run.steps())
    run.wing.engage()
    return run


@pytest.mark.parametrize("adapter", [LoRA(rank=2), None], ids=["lora", "whole"])
def test_01_the_first_loss_is_ln_2(adapter: LoRA | None, rows: list[dict[str, Any]]) -> None:
    (record,) = run_of(rows, adapter=adapter).steps()
    assert record.loss == float(torch.tensor(2.0).log())  # in float32
    assert record.metrics["rewards/accuracies"] == 0.5
    assert record.metrics["rewards/margins"] == 0.0


def test_02_the_gradient_is_one_factor_of_both_errors() -> None:
    """d loss / d L_w = beta/2 sigmoid(-m) = - d loss / d L_l, at the second golden."""
    errors = torch.tensor([0.1, 0.101], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1002, 0.1008], dtype=torch.float64)
    from alignkit.losses import PREFERENCE_LOSSES, PairScores

    policy, still = -0.5 * errors, -0.5 * reference
    scores = PairScores(policy[:1], policy[1:], still[:1], still[1:])
    loss = PREFERENCE_LOSSES["sigmoid"](scores, beta=BETA)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.313262, abs=1e-6)
    expected = 0.5 * BETA * 0.268941
    assert errors.grad.tolist() == pytest.approx([expected, -expected], rel=1e-5)


def test_03_swapped_labels_flip_the_sign(rows: list[dict[str, Any]]) -> None:
    run = trained(rows)
    swapped = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    other = run_of(swapped, adapter=LoRA(rank=2))
    ours = dict(run.wing.policy.unet.named_parameters())
    for name, parameter in other.wing.policy.unet.named_parameters():
        parameter.data.copy_(ours[name])
    found = logits(run, list(range(8)))
    assert found.abs().max() > 1e-2
    assert torch.allclose(logits(other, list(range(8))), -found, atol=1e-3)


def test_04_a_batch_is_the_mean_of_its_rows(rows: list[dict[str, Any]]) -> None:
    run = trained(rows)
    together = logits(run, [0, 3, 5])
    alone = torch.cat([logits(run, [row]) for row in (0, 3, 5)])
    assert torch.allclose(together, alone, atol=1e-3) and together.abs().max() > 1e-2
    whole, parts = (run_of(rows, adapter=LoRA(rank=2), micro_batch=n, max_steps=2) for n in (4, 1))
    losses = [[record.loss for record in one.steps()] for one in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_05_processes_see_draws_of_their_own(rows: list[dict[str, Any]]) -> None:
    """The second of two processes has the second half's positions, and so its draws."""
    wing = build_wing(make_pipeline(), adapter=LoRA(rank=2), **BUILD)
    batch = wing.examples(rows, None, kind="pairs", seed=0).collate(range(4), [0] * 4)
    whole = wing.backend.draw(batch, (0, 9))
    first, second = (wing.backend.draw(batch.select(half), (0, 9)) for half in ([0, 1], [2, 3]))
    assert [*first.timesteps.tolist(), *second.timesteps.tolist()] == whole.timesteps.tolist()
    sums = [float(noise.sum()) for noise in (*first.noise, *second.noise)]
    assert len(set(sums)) == 4 and sums == [float(noise.sum()) for noise in whole.noise]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [LoRA(rank=2), None], ids=["lora", "whole"])
def test_10_the_reference_stands_still(
    adapter: LoRA | None, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Through training, an interruption and a moving average of the policy."""

    def start() -> Any:
        options = TrainerOptions(
            max_steps=4, batch_size=4, learning_rate=1e-3, save_every=2, ema=0.5
        )
        return build(
            make_pipeline(),
            DPO(),
            rows,
            adapter=adapter,
            trainer=options,
            generation=GenerationOptions(steps=1),
            run_dir=tmp_path / "run",
        )

    def reference(run: Any) -> torch.Tensor:
        batch = run.trainer.source.examples.collate(range(4), [0] * 4)
        draw = run.wing.backend.draw(batch, (0, 0))
        with torch.no_grad():
            return run.trainer.objective.reference.log_likelihood(batch, draw, frozenset()).total

    run = start()
    before = reference(run)
    for record in run.steps():
        if record.step == 3:
            run.folder.unlock()
            break
    run.wing.engage()
    assert torch.equal(reference(run), before)
    again = start()
    list(again.steps())
    again.finish()
    again.wing.engage()
    assert torch.equal(reference(again), before)


@pytest.mark.slow
def test_11_a_resumed_run_continues_the_same_adapter(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The defect of the well-known script: a second, active adapter is loaded on resume, while the
    optimizer owns the first, and the exported one is zero."""

    def start() -> Any:
        return build(
            make_pipeline(),
            DPO(),
            rows,
            adapter=LoRA(rank=2),
            trainer=TrainerOptions(max_steps=4, batch_size=4, learning_rate=1e-2, save_every=2),
            generation=GenerationOptions(steps=1),
            run_dir=tmp_path / "run",
        )

    run = start()
    for record in run.steps():
        if record.step == 2:
            reached = [p.detach().clone() for p in run.trainer.parameters.values()]
        if record.step == 3:
            run.folder.unlock()
            break
    again = start()
    unet = again.wing.policy.unet
    assert list(unet.peft_config) == ["default"] and unet.active_adapters() == ["default"]
    owned = {id(p) for group in again.trainer.optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for name, p in unet.named_parameters() if ".lora_" in name}
    now = [p.detach() for p in again.trainer.parameters.values()]
    assert all(torch.equal(a, b) for a, b in zip(now, reached, strict=True))
    list(again.steps())
    assert not all(torch.equal(a, b) for a, b in zip(now, reached, strict=True))
    again.finish()
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "run" / "model" / "pytorch_lora_weights.safetensors")
    assert all(value.abs().max() > 0 for key, value in saved.items() if ".lora_B." in key)


def test_13_adapters_switch_under_checkpointing(rows: list[dict[str, Any]]) -> None:
    """The reference goes first; the adapter is on again while backward recomputes."""
    gradients = []
    for checkpointing in (False, True):
        run = run_of(rows, adapter=LoRA(rank=2), gradient_checkpointing=checkpointing)
        batch = run.trainer.source.examples.collate(range(4), [0] * 4)
        (micro,) = run.trainer.objective.micro_batches(batch, 1)
        loss, _ = run.trainer.objective(micro)
        loss.backward()
        gradients.append([p.grad for p in run.trainer.parameters.values()])
    assert max(float(g.abs().max()) for g in gradients[0]) > 0
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(plain, recomputed, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_13_adapters_switch_under_compile(rows: list[dict[str, Any]]) -> None:
    """A graph that was made with the adapter on is not used with it off."""
    wing = build_wing(make_pipeline(), adapter=LoRA(rank=2), **BUILD)
    test_likelihood.move(wing)
    batch = wing.examples(rows[:2], None, kind="pairs", seed=0).collate([0, 1], [0, 0])
    draw = wing.backend.draw(batch, (0, 1))

    def both() -> list[torch.Tensor]:
        with torch.no_grad():
            on = wing.backend.module(batch, draw).total
            with adapters_off(wing.policy.unet):
                off = wing.backend.module(batch, draw).total
            return [on, off, wing.backend.module(batch, draw).total]

    eager = both()
    for unit in wing.backend.module.shard_units():
        unit.compile(backend="aot_eager")
    compiled = both()
    assert not torch.allclose(eager[0], eager[1], atol=1e-4)
    for one, other in zip(eager, compiled, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


ELSEWHERE: dict[int, list[Any]] = {
    2: [test_likelihood.test_goldens],
    5: [
        test_likelihood.test_draws_differ_between_positions_steps_and_seeds,
        test_likelihood.test_no_split_changes_a_draw_or_a_score,
        test_likelihood.test_draws_that_are_not_shared_break_the_margin,
    ],
    6: [test_likelihood.test_errors_are_reduced_in_float32_whatever_the_model_computes_in],
    7: [test_data.test_ties_under_three_policies, test_layouts.test_pick_a_pics_flags],
    8: [
        test_data.test_crop_and_flip_are_shared_by_the_pair,
        test_data.test_caption_dropout_is_keyed_by_seed_epoch_and_row,
    ],
    9: [
        test_data.test_time_ids_are_each_images_own,
        test_data.test_time_ids_reach_the_embedding_unrounded,
        test_buckets.test_images_of_a_row_share_a_shape_and_keep_their_sizes,
    ],
    11: [test_runs.test_an_interrupted_run_ends_with_the_same_bits],
    12: [
        test_lora.test_saved_adapters_load_back_to_the_same_prediction,
        test_lora.test_kohya_names_of_every_layer_come_back,
    ],
    14: [test_data.test_latents_are_the_scaled_posterior_mean],
    15: [test_likelihood.test_dpo_steps_raise_the_margin],
}
"""Number -> tests that live by the code they are about."""


def test_all_fifteen_are_tested() -> None:
    here = {int(name[5:7]) for name in globals() if name[:5] == "test_" and name[5:7].isdigit()}
    assert here | set(ELSEWHERE) == set(range(1, 16))
