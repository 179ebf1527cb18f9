"""A diffusion model of one number: data N(m, 1), of which m is all there is to learn.

    noisy = a x + s noise,    a^2 = abar, s^2 = 1 - abar
    E[noise | noisy] = s (noisy - a m)        the exact denoiser, as a^2 + s^2 = 1

A log-ratio is -1/2 weight (policy error - reference error), the reference being m = 0. Between two
answers that differ by D and share their noise, the log-ratios differ by  weight a^2 s^2 m D,  with
nothing left of the noise; answers with noises n, n' of their own have  weight a^3 s m (n' - n)  on
top.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy.special import expit
from torch import Tensor, nn

from alignkit import Trainer, TrainerOptions
from alignkit.batches import Batch
from alignkit.losses import PREFERENCE_LOSSES
from alignkit.objectives.criterion import Criterion
from alignkit.objectives.preference import PreferenceObjective
from alignkit.reference import FrozenModel
from alignkit.sources import RowSource
from alignkit_diffusion.content import ImageContent, ImageDraw, PromptEmbeddings
from alignkit_diffusion.families import Prediction
from alignkit_diffusion.likelihood import DenoisingLikelihood, ImageBackend
from alignkit_diffusion.memory import MemoryModel
from alignkit_diffusion.schedule import Schedule
from tests.builders import ONE_PROCESS


class Shift(nn.Module):
    """The exact denoiser of N(m, 1) with m to be learnt; it starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(()))

    def forward(self, noisy: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        return spread * (noisy - signal * self.mean)


@dataclass(frozen=True)
class Gaussian:
    """The family of `Shift`: an `alignkit_diffusion.families.Family`, as far as training needs one.

    Attributes:
        schedule: how noise is added, and whether noise or v is predicted.
        weight: abar (N,) -> factor of the squared error (N,).
        shared: False gives the rejected answer the noise of another pair.
    """

    schedule: Schedule
    weight: Callable[[Tensor], Tensor]
    shared: bool = True
    name: str = "gaussian"
    timesteps: None = None

    @property
    def num_timesteps(self) -> int:
        return len(self.schedule)

    def conditioning(self, content: ImageContent, group: Tensor, device: Any) -> dict[str, Any]:
        return {}

    def timestep_weights(self, kind: str) -> Tensor:
        return self.schedule.weights(kind)

    def predict(
        self, unet: nn.Module, latents: Tensor, noise: Tensor, timesteps: Tensor, conditioning: Any
    ) -> Prediction:
        if not self.shared:
            noise = torch.stack([noise[0::2], noise[1::2].roll(1, 0)], dim=1).flatten(0, 1)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        signal, spread = self.schedule.coefficients(timesteps)
        prediction = unet(noisy, signal, spread)
        if self.schedule.prediction_type == "v_prediction":  # noise = signal v + spread noisy
            prediction = (prediction - spread * noisy) / signal
        weight = self.weight(self.schedule.alphas_cumprod[timesteps]).float()
        return Prediction(prediction, self.schedule.target(latents, noise, timesteps), weight)


class ReferencePairs:
    """Pairs of draws from N(0, 1), of which x is the better one with probability s(x - y).

    As `Examples`, in about 100 rows whose weights make sums over them expectations. What counts of
    a pair is D = x - y, from N(0, 2): that is at the nodes of a Gauss-Hermite rule, the heavy ones
    in several rows, so that a step sees many draws of what is random in it. x + y is drawn.
    """

    skipped: ClassVar[MappingProxyType[str, int]] = MappingProxyType({})

    def __init__(self) -> None:
        nodes, weights = hermegauss(10)
        weights /= weights.sum()
        times = np.ceil(100 * weights).astype(int)
        self.weight = (weights / times).repeat(times)
        total, apart = np.random.default_rng(0).normal(size=len(self.weight)), nodes.repeat(times)
        self.chosen, self.rejected = (total + apart) / 2**0.5, (total - apart) / 2**0.5

    def __len__(self) -> int:
        return len(self.weight)

    def collate(self, indices: Sequence[int], epochs: Sequence[int]) -> Batch:
        rows, num = list(indices), len(indices)
        values = np.stack([self.chosen[rows], self.rejected[rows]], axis=1).flatten()
        return Batch(
            content=ImageContent(
                latents=tuple(torch.tensor(values).float().view(-1, 1, 1, 1)),
                geometry=torch.zeros(2 * num, 6),
                prompts=PromptEmbeddings(torch.zeros(num, 1, 1)),
            ),
            group=torch.arange(2 * num) // 2,
            rank=torch.arange(2 * num) % 2,
            position=torch.arange(num),
            row_id=torch.tensor(rows),
            weight=torch.tensor(self.weight[rows]).float(),
            p_chosen=torch.tensor(expit(self.chosen - self.rejected)[rows]).float(),
        )


def likelihood(family: Gaussian, timestep_weighting: str = "uniform") -> DenoisingLikelihood:
    """Of the model N(0, 1)."""
    return DenoisingLikelihood(
        Shift(),
        family,
        precision="fp32",
        gradient_checkpointing=False,
        timestep_weighting=timestep_weighting,
    )


def learnt_shift(
    family: Gaussian,
    *,
    loss: str = "sigmoid",
    beta: float = 0.5,
    steps: int = 500,
    timestep_weighting: str = "uniform",
) -> float:
    """The mean that `Trainer` arrives at from the reference, with the population as its batch.

    Averaged over the later half of the steps, since what is random in a step keeps it moving.
    """
    module = likelihood(family, timestep_weighting)
    backend = ImageBackend(module, family, MemoryModel(1.0, 0, torch.device("cpu")))
    pairs = ReferencePairs()
    objective = PreferenceObjective(
        backend,
        FrozenModel.copy_of(module),
        Criterion.of(PREFERENCE_LOSSES[loss], beta=beta),
        budget=len(pairs),
    )
    source = RowSource(
        pairs, batch_size=len(pairs), epochs=None, seed=0, processes=ONE_PROCESS, shuffle=False
    )
    options = TrainerOptions(
        max_steps=steps, learning_rate=0.05, schedule="constant", warmup=0, log_every=steps
    )
    means = [module.unet.mean.item() for _ in Trainer(objective, source, options).steps()]
    return float(np.mean(means[steps // 2 :]))


def elbo(family: Gaussian, x: float, mean: float) -> float:
    """Mean of the log-likelihood of x under N(mean, 1) over all timesteps and noises.

    Errors are squares of the noise, for which three Gauss-Hermite nodes are exact.
    """
    module = likelihood(family, "nats")
    nn.init.constant_(module.unet.mean, mean)  # type: ignore[arg-type]
    nodes, weights = hermegauss(3)
    timesteps = torch.arange(family.num_timesteps).repeat(3)
    noise = torch.tensor(nodes).float().repeat_interleave(family.num_timesteps)
    num = len(timesteps)
    batch = Batch(
        content=ImageContent(
            latents=tuple(torch.full((num, 1, 1, 1), x)),
            geometry=torch.zeros(num, 6),
            prompts=PromptEmbeddings(torch.zeros(num, 1, 1)),
        ),
        group=torch.arange(num),
        rank=torch.zeros(num, dtype=torch.int64),
        position=torch.arange(num),
        row_id=torch.arange(num),
    )
    with torch.no_grad():
        total = module(batch, ImageDraw(timesteps, tuple(noise.view(-1, 1, 1, 1)))).total
    return float(total.view(3, -1).double().mean(1).numpy() @ weights / weights.sum())
