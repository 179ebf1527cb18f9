"""Methods on the image wing: the safeguard, timestep weightings, the ELBO in nats, KTO."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit import DPO, KTO, LoRA, TrainerOptions, build
from alignkit.batches import Batch
from alignkit.losses import PREFERENCE_LOSSES
from alignkit.objectives.criterion import Criterion
from alignkit.objectives.modifiers import Modifiers
from alignkit.objectives.preference import PreferenceObjective
from alignkit.reference import FrozenModel
from alignkit_diffusion.wing import build as build_wing
from tests.builders import loss_and_gradients, move
from tests.image.conftest import BUILD, make_pipeline, picture

BETA, MU = 300.0, 0.6


def pairs(num: int = 4) -> list[dict[str, Any]]:
    return [
        {"prompt": f"a {c} circle", "chosen": picture(2 * i), "rejected": picture(2 * i + 1)}
        for i, c in zip(range(num), ("red", "blue") * num, strict=False)
    ]


@pytest.fixture(scope="module")
def moved() -> tuple[Any, FrozenModel, Batch]:
    """A wing away from its reference, and four pairs."""
    wing = build_wing(make_pipeline(), adapter=LoRA(rank=2), **BUILD)
    reference = FrozenModel.copy_of(wing.backend.module)
    move(wing.backend.module, scale=0.3)
    examples = wing.examples(pairs(), None, kind="pairs", seed=0)
    return wing, reference, examples.collate(range(4), [0] * 4)


def residuals(wing: Any, batch: Batch, draw: Any) -> Tensor:
    """Prediction minus target of each image, one at a time."""
    module, found = wing.backend.module, []
    for answer, group in enumerate(batch.group.tolist()):
        latents = batch.content.latents[answer][None]
        content = batch.content.select([group], [answer])
        conditioning = module.family.conditioning(content, torch.tensor([0]), latents.device)
        noise, timestep = draw.noise[group][None], draw.timesteps[group : group + 1]
        made = module.family.predict(module.unet, latents, noise, timestep, conditioning)
        found.append((made.prediction - made.target)[0])
    return torch.stack(found)


def test_the_safeguard_scales_the_rejected_images_gradient_alone(moved) -> None:
    """Diffusion-SDPO: the loss is DPO's; each rejected error's gradient counts the factor less."""
    wing, reference, batch = moved
    module = wing.backend.module
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    criterion = Criterion.of(PREFERENCE_LOSSES["sigmoid"], beta=BETA)
    objective = PreferenceObjective(
        wing.backend, reference, criterion, modifiers=Modifiers(safeguard=MU), budget=4
    )
    loss, gradients = loss_and_gradients(objective, batch)
    plain, others = loss_and_gradients(
        PreferenceObjective(wing.backend, reference, criterion, budget=4), batch
    )
    assert loss == plain

    draw = wing.backend.draw(batch, (0, 1))
    g = residuals(wing, batch, draw)
    error = g.square().mean((1, 2, 3))
    with torch.no_grad():
        against = -2 * reference.log_likelihood(batch, draw, frozenset()).total
        w, ell = torch.arange(0, 8, 2), torch.arange(1, 8, 2)
        own, shared = (g[w] * g[w]).sum((1, 2, 3)), (g[w] * g[ell]).sum((1, 2, 3))
        ratio = ((1 - MU) * own / shared).clamp(0, 1)
        factor = torch.where(shared > 0, ratio, 1.0)
        logit = -BETA / 2 * ((error - against)[w] - (error - against)[ell])
        slope = BETA / 2 * torch.sigmoid(-logit) / 4
    assert factor.min() < 0.99, "a safeguard that never acts"
    surrogate = (slope * (error[w] - factor * error[ell])).sum()
    derived = torch.autograd.grad(surrogate, list(trained.values()))
    for name, gradient in zip(trained, derived, strict=True):
        gap = (gradients[name] - gradient).norm()
        assert gap <= 1e-3 * gradient.norm() + 1e-9, name
    assert any(not torch.allclose(gradients[n], others[n], rtol=1e-2) for n in gradients)


FEW = TrainerOptions(max_steps=2, batch_size=2, micro_batch=1, learning_rate=1e-3, log_every=1)


@pytest.mark.parametrize(
    "method",
    [
        DPO(beta=BETA, timestep_weighting="min_snr", safeguard=MU, anchor=0.1),
        DPO(beta=BETA, timestep_weighting="elbo"),
        DPO("cal_dpo", beta=1e-4, timestep_weighting="nats"),
        DPO(beta=1e-4, divergence="js_divergence", timestep_weighting="nats"),
        DPO({"sigmoid": 1.0, "hinge": 0.5}, beta=BETA),
    ],
    ids=str,
)
def test_options_of_images_reach_the_likelihood_and_train(method) -> None:
    run = build(make_pipeline(), method, pairs(2), adapter=LoRA(rank=2), trainer=FEW)
    assert run.wing.backend.module.timestep_weighting == method.timestep_weighting
    first, second = run.steps()
    assert first.metrics["rewards/margins"] == 0 != second.metrics["rewards/margins"]
    assert second.grad_norm > 0 and second.loss == second.loss
    told = run.facts["method"]
    assert told.get("timestep_weighting", "uniform") == method.timestep_weighting


def test_nats_are_the_elbos_weight_of_the_error() -> None:
    """With weights w_t of methods 5.1: log-ratio in nats = -T D w_t (error - its reference)."""
    totals = {}
    for weighting in ("uniform", "nats"):
        wing = build_wing(make_pipeline(), adapter=None, timestep_weighting=weighting, **BUILD)
        batch = wing.examples(pairs(2), None, kind="pairs", seed=0).collate(range(2), [0, 0])
        draw = wing.backend.draw(batch, (0, 1))
        with torch.no_grad():
            totals[weighting] = wing.backend.module(batch, draw).total.double()
    snr = wing.backend.module.family.schedule.snr(torch.arange(1000))
    t = draw.timesteps[batch.group]
    assert (t > 0).all()
    weight = 0.5 * (snr[t - 1] / snr[t] - 1)
    elements = batch.content.latents[0].numel()
    wanted = 2 * totals["uniform"] * 1000 * elements * weight
    torch.testing.assert_close(totals["nats"], wanted, rtol=1e-5, atol=1e-6)


def test_kto_on_images_learns_from_single_labelled_images() -> None:
    rows = [
        {"prompt": f"a {c} circle", "image": picture(i), "label": i % 2 == 0}
        for i, c in enumerate(("red", "blue", "red", "blue"))
    ]
    trainer = TrainerOptions(
        max_steps=3, batch_size=4, micro_batch=2, learning_rate=1e-2, warmup=0, log_every=1
    )
    run = build(make_pipeline(), KTO(), rows, adapter=LoRA(rank=2), trainer=trainer)
    records = list(run.steps())
    assert records[0].loss == 0.5 and records[0].metrics["objective/kl_baseline"] == 0
    assert records[-1].metrics["objective/kl_baseline"] != 0
