"""The forward process q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) and what a model predicts
of it.

Ho et al. 2020 (2006.11239), eq. 4; v-prediction: Salimans & Ho 2022 (2202.00512), app. D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alignkit.errors import ConfigError, refuse_unknown
from alignkit.losses.modifiers import TIMESTEP_WEIGHTINGS, nats_per_error, timestep_weights

WEIGHTINGS = (*TIMESTEP_WEIGHTINGS, "nats")
PREDICTION_TYPES = ("epsilon", "v_prediction")
BETAS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
"""Settings of a scheduler that say how noise was added in training."""
TURBO = (249, 499, 749, 999)
"""The timesteps that a model distilled to four steps was trained at, such as SDXL-Turbo (Sauer et
al. 2023, 2311.17042)."""
PURE_NOISE = 1e-10
"""A last abar below this is a terminal signal-to-noise ratio of zero, up to rounding."""


@dataclass(frozen=True)
class Schedule:
    """A discrete variance-preserving noise schedule.

    Attributes:
        alphas_cumprod: (T,) float64 on the CPU: abar_t, the share of signal power at timestep t.
        prediction_type: "epsilon" (the noise) or "v_prediction" (sqrt(abar) noise - sqrt(1 - abar)
            x_0).
        drawn: the timesteps that training draws from, rising; None is all.
    """

    alphas_cumprod: Tensor
    prediction_type: str
    drawn: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def restricted(self, timesteps: str | Sequence[int]) -> Schedule:
        """The schedule of a model that knows a few timesteps alone.

        Args:
            timesteps: "turbo" is `TURBO` on the schedule rescaled to zero terminal SNR; or a list
                of timesteps, on the schedule as it is.

        Raises:
            ConfigError: a timestep is not in the schedule, or stands twice.
        """
        if timesteps == "turbo":
            ended = replace(self, alphas_cumprod=zero_terminal_snr(self.alphas_cumprod))
            return ended.restricted(TURBO)
        wanted: list[Any] = [timesteps] if isinstance(timesteps, str) else list(timesteps)
        bad = [t for t in wanted if not isinstance(t, int) or not 0 <= t < len(self)]
        if bad or not wanted or len(set(wanted)) < len(wanted):
            raise ConfigError(
                'method.timesteps is "turbo" or a list of different timesteps between 0 and '
                f"{len(self) - 1}, the last of this model's schedule; got {timesteps!r}."
            )
        return replace(self, drawn=tuple(sorted(wanted)))

    def snr(self, timesteps: Tensor) -> Tensor:
        """abar_t / (1 - abar_t), float64, in the shape of `timesteps`."""
        abar = self.alphas_cumprod[timesteps]
        return abar / (1 - abar)

    def weights(self, kind: str) -> Tensor:
        """(T,) float64, what half an image's mean squared error counts at each timestep.

        "uniform", "min_snr" and "elbo" have mean 1 over the timesteps that are drawn, see
        `losses.modifiers.timestep_weights`. "nats" is 2 T w_t, w the exact weights of the ELBO:
        times the latent's elements, the mean over timesteps of minus half the weighted error is the
        ELBO in nats, up to a constant.

        Raises:
            ConfigError: `kind` is unknown, or has no meaning for this schedule.
        """
        refuse_unknown("timestep_weighting", kind, WEIGHTINGS)
        if kind == "nats" and self.drawn is not None:
            raise ConfigError(
                "timestep_weighting='nats' is the ELBO, a sum over all timesteps; got "
                f"timesteps={list(self.drawn)}. Leave one of the two out."
            )
        endless = self.prediction_type == "epsilon" and float(self.alphas_cumprod[-1]) < PURE_NOISE
        if endless and kind in ("elbo", "nats"):
            raise ConfigError(
                f"timestep_weighting={kind!r} weighs errors of the noise by the relative change of "
                "the signal-to-noise ratio, which is without bound where a schedule ends in pure "
                "noise, as this model's does. Write 'uniform' or 'min_snr'."
            )
        if kind == "nats":
            return 2 * nats_per_error(self.alphas_cumprod, 1, self.prediction_type)
        found = timestep_weights(kind, self.alphas_cumprod, self.prediction_type)
        return found if self.drawn is None else found / found[list(self.drawn)].mean()

    def coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), (N, 1, 1, 1) float32 on the CPU, at timesteps (N,)."""
        abar = self.alphas_cumprod[timesteps]
        signal, noise = abar.sqrt(), (1 - abar).sqrt()
        return signal.float().view(-1, 1, 1, 1), noise.float().view(-1, 1, 1, 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise; (N, C, H, W) for CPU timesteps (N,)."""
        signal, spread = (c.to(latents.device) for c in self.coefficients(timesteps))
        return signal * latents + spread * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict of x_t, (N, C, H, W)."""
        if self.prediction_type == "epsilon":
            return noise
        signal, spread = (c.to(latents.device) for c in self.coefficients(timesteps))
        return signal * noise - spread * latents


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """The schedule moved and stretched so that its last timestep is pure noise.

    Lin et al. 2023 (2305.08891), Alg. 1: sqrt(abar) is shifted to end at 0 and scaled to begin
    where it began.
    """
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()


def read_schedule(scheduler: Any) -> Schedule:
    """The training schedule behind a pipeline's sampler, which is only read.

    Raises:
        ConfigError: the sampler has no discrete variance-preserving schedule, or predicts x_0.
    """
    from diffusers import DDPMScheduler

    config = scheduler.config
    kind = type(scheduler).__name__
    missing = [name for name in ("beta_schedule", "prediction_type") if name not in config]
    if missing:
        raise ConfigError(
            f"Image policies need a scheduler with betas and a prediction type; got {kind} "
            f"without {' and '.join(missing)}. Give the pipeline the scheduler that it was "
            "trained with, such as EulerDiscreteScheduler or DDPMScheduler."
        )
    if config["prediction_type"] not in PREDICTION_TYPES:
        raise ConfigError(
            f"Image policies predict {' or '.join(PREDICTION_TYPES)}; the pipeline's {kind} says "
            f"{config['prediction_type']!r}. Correct `prediction_type` in scheduler_config.json "
            "if the model was trained otherwise; a model that predicts the sample is not "
            "supported."
        )
    # Every sampler keeps the training betas in its own shape; DDPM's constructor is their plain
    # form.
    betas = DDPMScheduler(**{name: config[name] for name in BETAS if name in config}).betas
    alphas_cumprod = torch.cumprod(1.0 - betas.double(), dim=0)
    return Schedule(alphas_cumprod, config["prediction_type"])
