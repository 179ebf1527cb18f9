"""The invariants of Diffusion-DPO that must hold whatever else changes, each by its number.

Each has a test here; those that look at the code in question from nearer by stand beside it, and
`BESIDE` names them.

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

import numpy as np
import pytest
import torch
from PIL import Image

from alignkit import (
    DPO,
    DataError,
    GenerationOptions,
    ImageOptions,
    LoRA,
    TrainerOptions,
    align,
    build,
)
from alignkit.adapters import adapters_off
from alignkit_diffusion import build as build_wing
from alignkit_diffusion.lora import DIFFUSERS_FILE, KOHYA_FILE
from tests.image import (
    test_buckets,
    test_cache,
    test_data,
    test_layouts,
    test_likelihood,
    test_lora,
    test_runs,
)
from tests.image.conftest import BUILD, make_pipeline, picture

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


def test_06_errors_are_reduced_in_float32(rows: list[dict[str, Any]]) -> None:
    """Of a UNet in bfloat16, the logits are those of its very predictions in float64."""
    wing = build_wing(make_pipeline(), adapter=LoRA(rank=2), **{**BUILD, "precision": "bf16"})
    batch = wing.examples(rows[:3], None, kind="pairs", seed=0).collate(range(3), [0] * 3)
    draw = wing.backend.draw(batch, (0, 1))
    said: list[torch.Tensor] = []
    handle = wing.policy.unet.register_forward_hook(lambda *given: said.append(given[-1][0]))
    with torch.no_grad():
        total = wing.backend.module(batch, draw).total
    handle.remove()
    assert said[0].dtype == torch.bfloat16 and total.dtype == torch.float32
    noise = torch.stack(draw.noise)[batch.group].double()
    exact = -0.5 * (said[0].double() - noise).square().mean(dim=(1, 2, 3))
    assert (BETA * (total - exact)).abs().max() < 1e-3
    half = -0.5 * (said[0] - noise.bfloat16()).square().mean(dim=(1, 2, 3))
    assert (BETA * (half - exact)).abs().max() > 0.1  # what reducing in it would do


def test_07_ties_follow_a_rule_and_are_counted(rows: list[dict[str, Any]]) -> None:
    labels = (1.0, 0.5, 0.0, 0.5)
    picked = [
        {"caption": r["prompt"], "jpg_0": r["chosen"], "jpg_1": r["rejected"], "label_0": label}
        for r, label in zip(rows, labels, strict=False)
    ]
    wing = build_wing(make_pipeline(), adapter=LoRA(rank=2), **BUILD)

    def read(**ties: Any) -> Any:
        return wing.examples(picked, ImageOptions(**ties), kind="pairs", seed=0)

    dropped, half = read(), read(ties="half")
    assert list(dropped.labels.rows) == [0, 2] and dropped.skipped == {"tie": 2}
    assert half.collate(range(4), [0] * 4).p_chosen.tolist() == [1.0, 0.5, 1.0, 0.5]
    with pytest.raises(DataError, match="tie"):
        read(ties="error")


def test_08_crop_flip_and_dropout_are_shared_by_a_pair() -> None:
    """Twice the same picture in a pair: whatever an epoch does, both sides stay the same."""
    same = {"prompt": "a cat", "chosen": picture(1, 40, 24), "rejected": picture(1, 40, 24)}
    options = ImageOptions(
        crop="random", flip=True, caption_dropout=0.5, identical_pairs="keep", resolution=16
    )
    wing = build_wing(make_pipeline(), adapter=LoRA(rank=2), **BUILD)
    examples = wing.examples([same], options, kind="pairs", seed=0)
    seen = []
    for epoch in range(8):
        content = examples.collate([0], [epoch]).content
        assert torch.equal(*content.latents) and torch.equal(*content.geometry)
        assert len(content.prompts) == 1  # one for both, dropped or not
        seen.append((content.latents[0].sum().item(), bool(content.prompts.hidden.any())))
    assert len({latent for latent, _ in seen}) > 4 and {kept for _, kept in seen} == {True, False}


def test_09_time_ids_are_each_images_own_in_a_batch_of_mixed_sizes() -> None:
    """As the UNet gets them. 40 x 20 covers 16 px at 32 x 16, and its middle begins at 8."""
    sizes = ((40, 20), (16, 16), (24, 30), (1366, 64))  # width, height
    expected = [
        [20, 40, 0, 8, 16, 16],
        [16, 16, 0, 0, 16, 16],
        [30, 24, 2, 0, 16, 16],
        [64, 1366, 0, 163, 16, 16],  # in bfloat16, 1366 would be 1368
    ]
    pictures = [picture(number, *size) for number, size in enumerate(sizes)]
    pairs = [
        {"prompt": "a cat", "chosen": pictures[i], "rejected": pictures[i + 1]} for i in (0, 2)
    ]
    wing = build_wing(make_pipeline(), adapter=LoRA(rank=2), **{**BUILD, "precision": "bf16"})
    batch = wing.examples(pairs, None, kind="pairs", seed=0).collate([0, 1], [0, 0])
    seen: list[torch.Tensor] = []
    projection = wing.policy.unet.add_time_proj
    projection.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        wing.backend.module(batch, wing.backend.draw(batch, (0, 1)))
    assert seen[0].dtype == torch.float32 and seen[0].view(4, 6).tolist() == expected


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


@pytest.mark.parametrize("name", [DIFFUSERS_FILE, KOHYA_FILE])
def test_12_exported_adapters_predict_the_same(
    name: str, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """What training left, read by diffusers' own reader from either file."""
    run = trained(rows)
    run.wing.save(tmp_path, base="owner/base")
    pipe = make_pipeline()
    before = test_lora.prediction(pipe.unet)
    pipe.load_lora_weights(tmp_path, weight_name=name)
    expected = test_lora.prediction(run.wing.policy.unet)
    assert torch.allclose(test_lora.prediction(pipe.unet), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(before, expected, rtol=0, atol=1e-3)


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


@pytest.mark.slow
def test_14_training_from_the_cache_is_training_without(
    pipeline_folder: Path, image_folder: Any, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """From disk, by a run that finds everything there and encodes nothing; and half precision
    within its rounding."""
    data = image_folder(rows)

    def losses(**options: Any) -> list[float]:
        run = build(
            str(pipeline_folder),
            DPO(),
            data,
            adapter=LoRA(rank=2),
            data_options=ImageOptions(resolution=16, flip=True, caption_dropout=0.3, **options),
            trainer=TrainerOptions(max_steps=4, batch_size=4, learning_rate=1e-3, precision="fp32"),
        )
        return [record.loss for record in run.steps()]

    plain = losses()
    for dtype, tolerance in (("fp32", 1e-4), ("fp16", 2e-2)):
        cache = {"cache": str(tmp_path / "cache"), "cache_dtype": dtype}
        filled, found = losses(**cache), losses(**cache)
        assert filled == found == pytest.approx(plain, abs=tolerance)
    assert max(abs(loss - plain[0]) for loss in plain) > 2e-2  # they move


def tinted(seed: int, channel: int) -> Image.Image:
    """A random picture in which one colour is strong everywhere."""
    drawn = np.random.default_rng(seed)
    coarse = drawn.integers(0, 160, (4, 4, 3)).astype(np.uint8)
    coarse[..., channel] = drawn.integers(200, 256, (4, 4))
    return Image.fromarray(coarse).resize((16, 16), Image.Resampling.BICUBIC)


@pytest.mark.slow
def test_15_a_toy_preference_is_learned_and_the_winner_not_spoiled() -> None:
    """Red over blue. On pictures that no row of training has, from chance to four in five; the
    winner's error falls below the reference's, and the loser's less."""

    def pairs(numbers: range) -> list[dict[str, Any]]:
        return [
            {"prompt": "a cat", "chosen": tinted(2 * n, 0), "rejected": tinted(2 * n + 1, 2)}
            for n in numbers
        ]

    result = align(
        make_pipeline(),
        DPO(anchor=3.0),
        pairs(range(24)),
        eval_data=pairs(range(100, 116)),
        trainer=TrainerOptions(
            max_steps=60, batch_size=8, learning_rate=1e-4, precision="fp32", eval_every=60
        ),
    )
    found = result.metrics
    assert found["eval/rewards/accuracies"] >= 0.8
    assert found["eval/error/chosen"] < found["eval/error/rejected"]
    assert found["eval/error/chosen"] <= 0


BESIDE: dict[int, list[Any]] = {
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
    14: [
        test_cache.test_cached_and_uncached_agree,
        test_cache.test_half_precision_is_within_its_rounding,
        test_data.test_latents_are_the_scaled_posterior_mean,
    ],
    15: [test_likelihood.test_dpo_steps_raise_the_margin],
}
"""Number -> further tests, where the code is that they are about."""


def test_all_fifteen_are_tested() -> None:
    here = {int(name[5:7]) for name in globals() if name[:5] == "test_" and name[5:7].isdigit()}
    assert here == set(range(1, 16)) and set(BESIDE) <= here
