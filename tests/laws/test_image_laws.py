"""The laws of preference training that are the image wing's own: one draw for all, equal to the
last bit where policy and reference are equal, and the published formula."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit import DPO, LoRA, TrainerOptions, build
from alignkit.batches import Batch
from tests.builders import move
from tests.image.conftest import make_pipeline, picture

SIZES = [(8, 8), (9, 8), (12, 20), (16, 8), (8, 11)]


def pipeline(**changed: Any) -> Any:
    """2 x 2 latents in its middle, where kernels are chosen with least margin."""
    return make_pipeline(**({"sample_size": 4} | changed))


def rows(num: int = 5) -> list[dict[str, Any]]:
    return [
        {
            "prompt": ["a red circle", "a blue square", "big cat"][i % 3],
            "chosen": picture(2 * i, *SIZES[i % 5]),
            "rejected": picture(2 * i + 1, *SIZES[-1 - i % 5]),
        }
        for i in range(num)
    ]


def run_of(policy: Any, loss: str = "sigmoid", *, method: Any = None, **given: Any) -> Any:
    trainer = {"max_steps": 1, "batch_size": 5, "micro_batch": 1, "precision": "fp32"}
    trainer |= {k: given.pop(k) for k in list(given) if k in TrainerOptions.__dataclass_fields__}
    method = method or DPO(loss=loss)
    return build(policy, method, rows(), trainer=TrainerOptions(**trainer), **given)


def first_batch(run: Any) -> Batch:
    return next(iter(run.trainer.source))


def pieces(run: Any, batch: Batch, step: int = 1) -> list[tuple[float, dict[str, float]]]:
    """(loss, metrics) of each pair alone."""
    found = []
    for micro in run.trainer.objective.micro_batches(batch, step):
        loss, metrics = run.trainer.objective(micro)
        found.append((loss.item(), {k: (v / n).item() for k, (v, n) in metrics.items()}))
    return found


def _plain(folder: Path) -> dict[str, Any]:
    return {"policy": pipeline()}


def _saved(folder: Path) -> dict[str, Any]:
    pipeline().save_pretrained(folder / "pipeline")
    return {"policy": str(folder / "pipeline")}


def _continued(folder: Path) -> dict[str, Any]:
    """A fresh run's adapter, moved and saved, goes on."""
    first = run_of(pipeline(), adapter=LoRA(rank=2, targets="all"))
    move(first.wing.backend.module, 0.3)
    first.wing.save(folder / "adapter")
    return {"policy": pipeline(), "adapter": LoRA(continue_from=str(folder / "adapter"))}


def _carried(folder: Path) -> dict[str, Any]:
    """The pipeline in hand carries an adapter that has been trained."""
    pipe = pipeline()
    first = run_of(pipe, adapter=LoRA(rank=2, kind="dora"))
    move(first.wing.backend.module, 0.3)
    first.wing.release()
    return {"policy": pipe}


STARTS: dict[str, tuple[Callable[[Path], dict[str, Any]], dict[str, Any], str]] = {
    "fresh LoRA, adapter off": (_plain, {"adapter": LoRA(rank=4)}, "adapter_off"),
    "fresh LoRA on all layers": (_plain, {"adapter": LoRA(targets="all")}, "adapter_off"),
    "fresh LoRA, frozen copy": (
        _plain,
        {"adapter": LoRA(rank=4), "reference": "frozen"},
        "frozen",
    ),
    "fresh DoRA": (_plain, {"adapter": LoRA(rank=4, kind="dora")}, "frozen_adapter"),
    "whole, in hand": (_plain, {}, "frozen"),
    "whole, loaded": (_saved, {}, "frozen"),
    "continued LoRA": (_continued, {}, "frozen_adapter"),
    "carried DoRA": (_carried, {}, "frozen_adapter"),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("start", STARTS)
def test_policy_at_its_reference_has_margin_0_and_loss_ln_2_to_the_last_bit(
    start: str, precision: str, tmp_path: Path
) -> None:
    make, given, reference = STARTS[start]
    arguments = make(tmp_path) | given
    run = run_of(arguments.pop("policy"), **arguments, precision=precision)
    assert run.facts["method"]["reference"] == reference
    ln_2 = torch.tensor(math.log(2)).item()  # in float32
    for step in (1, 2, 3):
        for loss, metrics in pieces(run, first_batch(run), step):
            assert loss == ln_2
            assert metrics["rewards/margins"] == metrics["rewards/chosen"] == 0
            assert metrics["rewards/accuracies"] == 0.5


def test_robust_costs_ln_2_too() -> None:
    method = DPO(loss="robust", label_smoothing=0.2)
    run = run_of(pipeline(), method=method, adapter=LoRA(rank=2))
    for loss, _ in pieces(run, first_batch(run)):
        assert loss == torch.tensor(math.log(2)).item()


class Unshared:
    """A reference that makes a draw of its own."""

    def __init__(self, inner: Any, backend: Any) -> None:
        self.inner, self.backend = inner, backend

    def log_likelihood(self, batch: Batch, draw: Any, want: frozenset[str]) -> Any:
        return self.inner.log_likelihood(batch, self.backend.draw(batch, (0, 99)), want)


def test_a_draw_that_is_not_shared_breaks_the_law() -> None:
    run = run_of(pipeline(), adapter=LoRA(rank=2))
    objective, batch = run.trainer.objective, first_batch(run)
    objective.reference = Unshared(objective.reference, objective.backend)
    margins = [abs(metrics["rewards/margins"]) for _, metrics in pieces(run, batch)]
    assert min(margins) > 1, "far beyond what training could ever do at beta 5000"


def errors_in_float64(unet: Any, batch: Batch, draw: Any, prediction_type: str) -> list[float]:
    """Mean squared errors by Ho et al. 2020 eq. 4 and Salimans & Ho 2022 app. D, image by image."""
    unet = copy.deepcopy(unet).double()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    found = []
    for answer, group in enumerate(batch.group.tolist()):
        t = int(draw.timesteps[group])
        abar = torch.prod(1 - betas[: t + 1])
        clean, noise = batch.content.latents[answer].double(), draw.noise[group].double()
        with torch.no_grad():
            predicted = unet(
                (abar.sqrt() * clean + (1 - abar).sqrt() * noise)[None],
                torch.tensor(t),
                encoder_hidden_states=batch.content.prompts.hidden[group][None].double(),
                added_cond_kwargs={
                    "text_embeds": batch.content.prompts.pooled[group][None].double(),
                    "time_ids": batch.content.geometry[answer][None],
                },
            ).sample[0]
        v = abar.sqrt() * noise - (1 - abar).sqrt() * clean
        target = noise if prediction_type == "epsilon" else v
        found.append(float((target - predicted).square().mean()))
    return found


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_logits_are_the_published_ones(prediction_type: str) -> None:
    """-beta/2 [(L_w - L_l) - (R_w - R_l)], Wallace et al. 2023; in float64 from the latents on."""
    policy, other = (pipeline(prediction_type=prediction_type) for _ in range(2))
    move(other.unet, 0.05)
    beta = 40.0
    run = run_of(policy, method=DPO(beta=beta), reference=other)
    batch = first_batch(run)
    for step in (1, 7):
        draw = run.trainer.objective.backend.draw(batch, (0, step))
        mine = errors_in_float64(policy.unet, batch, draw, prediction_type)
        theirs = errors_in_float64(other.unet, batch, draw, prediction_type)
        logits = [
            -beta / 2 * ((mine[i] - mine[i + 1]) - (theirs[i] - theirs[i + 1]))
            for i in range(0, len(mine), 2)
        ]
        assert max(map(abs, logits)) > 0.1
        for (loss, metrics), logit in zip(pieces(run, batch, step), logits, strict=True):
            assert metrics["rewards/margins"] == pytest.approx(logit, rel=1e-3, abs=1e-4)
            assert loss == pytest.approx(math.log1p(math.exp(-logit)), abs=1e-4)


@pytest.mark.parametrize("start", ["fresh LoRA, adapter off", "continued LoRA", "fresh DoRA"])
def test_recomputing_sees_the_policy_and_not_the_reference(start: str, tmp_path: Path) -> None:
    """The adapter is switched or exchanged for the reference, and back before backward."""
    gradients: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        make, given, _ = STARTS[start]
        folder = tmp_path / str(checkpointing)
        arguments = make(folder) | given
        policy = arguments.pop("policy")
        run = run_of(policy, **arguments, gradient_checkpointing=checkpointing)
        move(run.wing.backend.module, 0.3)
        for micro in run.trainer.objective.micro_batches(first_batch(run), 1):
            run.trainer.objective(micro)[0].backward()
        parameters = run.trainer.parameters.items()
        gradients.append({name: p.grad for name, p in parameters if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys() and plain
    for name, gradient in plain.items():
        assert gradient.norm() > 0
        assert (gradient - recomputed[name]).norm() <= 1e-5 * gradient.norm(), name
