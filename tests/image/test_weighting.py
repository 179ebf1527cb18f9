"""Weights over timesteps, the ELBO in nats, and what the safeguard needs: against derivations of
their own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignkit.batches import Batch
from alignkit.errors import ConfigError
from alignkit.options import LoRA
from alignkit_diffusion import build
from alignkit_diffusion.content import ImageContent, ImageDraw, PromptEmbeddings
from alignkit_diffusion.families import Prediction
from alignkit_diffusion.likelihood import DenoisingLikelihood
from alignkit_diffusion.schedule import Schedule
from tests.image.conftest import BUILD, make_pipeline, picture
from tests.image.test_likelihood import Fixed

T = 1000
LOW, HIGH = math.sqrt(0.00085), math.sqrt(0.012)
BETAS = [(LOW + (HIGH - LOW) * t / (T - 1)) ** 2 for t in range(T)]
ABAR = [math.prod(1 - beta for beta in BETAS[: t + 1]) for t in range(T)]
SNR = [abar / (1 - abar) for abar in ABAR]


def exact(t: int) -> float:
    """Ho et al. 2020 eq. 12 with the posterior variance: beta^2 / (2 var alpha (1 - abar))."""
    if t == 0:
        return 0.0
    beta = BETAS[t]
    variance = (1 - ABAR[t - 1]) / (1 - ABAR[t]) * beta
    return beta**2 / (2 * variance * (1 - beta) * (1 - ABAR[t]))


OF_NOISE = {
    "uniform": [1.0] * T,
    "min_snr": [min(snr, 5.0) / snr for snr in SNR],
    "elbo": [exact(max(t, 10)) for t in range(T)],
    "nats": [exact(t) for t in range(T)],
}


def by_hand(kind: str, prediction_type: str) -> list[float]:
    """What -1/2 times the mean squared error counts; under "nats" -1 times the sum, times T."""
    weights = OF_NOISE[kind]
    if prediction_type == "v_prediction" and kind != "uniform":
        weights = [weight * abar for weight, abar in zip(weights, ABAR, strict=True)]
    mean = 1.0 if kind == "nats" else sum(weights) / T
    return [weight / mean for weight in weights]


def single_batch(num: int, *shape: int, groups: list[int] | None = None, rank: Any = None) -> Batch:
    """Images of zeros."""
    group = torch.tensor(groups or range(num))
    size = int(group.max()) + 1
    return Batch(
        ImageContent(
            tuple(torch.zeros(num, *shape)),
            torch.zeros(num, 6),
            PromptEmbeddings(torch.zeros(size, 1, 1)),
        ),
        group,
        torch.full((num,), -1) if rank is None else torch.tensor(rank),
        torch.arange(size),
        torch.arange(size),
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["uniform", "min_snr", "elbo", "nats"])
def test_totals_of_a_pipeline_are_weighted_by_timestep(kind: str, prediction_type: str) -> None:
    pipe = make_pipeline(prediction_type=prediction_type)
    wing = build(pipe, adapter=LoRA(rank=2), timestep_weighting=kind, **BUILD)
    rows = [{"prompt": "a cat", "image": picture(i, 16, 16), "label": True} for i in range(5)]
    batch = wing.examples(rows, None, kind="unpaired", seed=0).collate(range(5), [0] * 5)
    timesteps = torch.tensor([0, 3, 250, 500, 999])
    noise = tuple(torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        found = wing.backend.module(batch, ImageDraw(timesteps, noise), frozenset({"error"}))
    weights = by_hand(kind, prediction_type)
    for row, t in enumerate(timesteps.tolist()):
        error = found.extras["error"][row].item()
        factor = 256 * T if kind == "nats" else 0.5
        expected = -factor * weights[t] * error
        assert found.total[row].item() == pytest.approx(expected, rel=1e-5)
    assert wing.describe()["timestep_weighting"] == kind
    assert ("nats" in wing.describe()["log_ratio_unit"]) == (kind == "nats")


def test_published_figures_of_the_sdxl_schedule() -> None:
    weights = by_hand("nats", "epsilon")
    assert sum(weights) == pytest.approx(6.527743, abs=1e-5)
    table = {1: 0.5032, 10: 0.0518, 100: 0.0066, 250: 0.0037, 500: 0.0033, 750: 0.0043, 999: 0.0061}
    for t, weight in table.items():
        assert weights[t] == pytest.approx(weight, abs=5e-5)
    found = Schedule(torch.tensor(ABAR, dtype=torch.float64), "epsilon").weights("nats") / (2 * T)
    assert found.tolist() == pytest.approx(weights, rel=1e-9)
    for kind in ("min_snr", "elbo"):
        shipped = Schedule(torch.tensor(ABAR, dtype=torch.float64), "epsilon").weights(kind)
        assert shipped.mean().item() == pytest.approx(1)
        assert shipped.tolist() == pytest.approx(by_hand(kind, "epsilon"), rel=1e-9)
    # beta of the published unit -> beta of the ELBO in nats, were the weights flat.
    for beta, pixels, nats in ((5000, 1024, 0.0058), (5000, 512, 0.023), (2000, 512, 0.0093)):
        elements = 4 * (pixels // 8) ** 2
        assert beta / (2 * elements * sum(weights)) == pytest.approx(nats, rel=0.02)


class Exact(nn.Module):
    """The exact denoiser of N(mean, variance) in every element, and its family."""

    name = "exact"
    num_timesteps = T
    timesteps = None

    def __init__(self, mean: float, variance: float, prediction_type: str) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.mean, self.variance = mean, variance
        self.schedule = Schedule(torch.tensor(ABAR, dtype=torch.float64), prediction_type)

    def conditioning(self, *_: Any) -> dict[str, Any]:
        return {}

    def timestep_weights(self, kind: str) -> Tensor:
        return self.schedule.weights(kind)

    def predict(self, unet: Any, latents: Tensor, noise: Tensor, t: Tensor, _: Any) -> Prediction:
        a2 = self.schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
        s2 = 1 - a2
        noisy = a2.sqrt() * latents + s2.sqrt() * noise
        # E[noise | noisy]; the spread of noisy is a2 v + s2.
        guess = s2.sqrt() * (noisy - a2.sqrt() * self.mean) / (a2 * self.variance + s2)
        if self.schedule.prediction_type == "v_prediction":
            guess = (guess - s2.sqrt() * noisy) / a2.sqrt()
        target = self.schedule.target(latents, noise, t)
        return Prediction(guess, target, torch.ones(len(latents)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("clean", "policy", "reference", "ratio"),
    [
        (0.7, (0.5, 1.0), (0.0, 1.0), 0.225),
        (-1.2, (1.0, 1.0), (0.0, 1.0), -1.7),
        (0.3, (0.2, 0.5), (0.0, 1.0), 0.381574),
    ],
)
def test_nats_are_the_log_density_ratio_of_exact_denoisers(
    clean: float, policy: Any, reference: Any, ratio: float, prediction_type: str
) -> None:
    """The mean over all timesteps of the log-ratio, over two elements: twice one element's.

    Errors are quadratic in the noise, so that noise +1 and -1 have its expectation exactly. Coarse
    where the variances differ, as the schedule neither starts nor ends at pure signal or noise.
    """
    batch = single_batch(2 * T, 2, 1, 1)
    for latents in batch.content.latents:
        latents.fill_(clean)
    signs = torch.tensor([1.0, -1.0]).repeat(T)
    draw = ImageDraw(
        torch.arange(T).repeat_interleave(2), tuple(signs.view(-1, 1, 1, 1).expand(-1, 2, 1, 1))
    )

    def total(mean: float, variance: float) -> Tensor:
        model: Any = Exact(mean, variance, prediction_type)
        module = DenoisingLikelihood(
            model, model, precision="fp32", gradient_checkpointing=False, timestep_weighting="nats"
        )
        return module(batch, draw).total.double()

    found = (total(*policy) - total(*reference)).mean().item()
    of_density = sum(
        sign * (-0.5 * math.log(2 * math.pi * v) - (clean - m) ** 2 / (2 * v))
        for sign, (m, v) in ((1, policy), (-1, reference))
    )
    assert of_density == pytest.approx(ratio, abs=1e-6)
    assert found == pytest.approx(2 * ratio, rel=0.02)


def test_unknown_weightings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"timestep_weighting 'min_sn'.*Did you mean 'min_snr'"):
        build(make_pipeline(), adapter=LoRA(rank=2), timestep_weighting="min_sn", **BUILD)


def test_overlap_is_the_product_of_gradients_in_output_space() -> None:
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 7, 4, 3, 3)
    batch = single_batch(7, 4, 3, 3, groups=[0, 0, 1, 1, 1, 2, 2], rank=[1, 0, -1, 2, 1, 0, 0])
    best = [1, 1, 4, 4, 4, 5, 5]
    draw = ImageDraw(torch.zeros(3, dtype=torch.int64), tuple(torch.zeros(3, 4, 3, 3)))
    prediction.requires_grad_()
    fixed: Any = Fixed(prediction, target)
    module = DenoisingLikelihood(fixed, fixed, precision="fp32", gradient_checkpointing=False)
    found = module(batch, draw, frozenset({"overlap", "error"}))
    assert not found.extras["overlap"].requires_grad
    (gradients,) = torch.autograd.grad(found.extras["error"].sum(), prediction)
    flat = gradients.double().flatten(1)
    for image, other in enumerate(best):
        # The gradient of the mean of squares over 36 elements is 2 / 36 of the residual.
        product = (flat[image] @ flat[other]).item() * 36 / 4
        assert found.extras["overlap"][image].item() == pytest.approx(product, rel=1e-5)
    own = found.extras["error"][best].double()
    torch.testing.assert_close(found.extras["overlap"][best].double(), own, rtol=1e-6, atol=0)
