"""Beta of Diffusion-DPO in the conventions that are in use, turned into one another.

All of them put one number on the difference of squared denoising errors, summed over the D elements
of a latent:  logit = -c [(|e_w|^2 - |r_w|^2) - (|e_l|^2 - |r_l|^2)],  e the policy's errors, r the
reference's. They differ in what of c is called beta:

    alignkit   c = beta / (2 D)      mean over elements and one half: Wallace et al.'s code, and
                                     diffusers' SDXL script
    no_half    c = beta / D          mean, no half: diffusers' SD 1.5 script, and others
    sum        c = beta              sum over elements, no half
    sum_half   c = beta / 2          sum, and one half
    nats       c = beta w            w the mean weight of the ELBO's terms times the timesteps,
                                     6.53 for SDXL's schedule: `timestep_weighting="nats"`, were its
                                     weights flat
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from alignkit.errors import ConfigError, refuse_unknown
from alignkit.ranges import positive

ELBO_WEIGHTS = 6.53
"""Sum over timesteps of the exact weights of SDXL's and SD 1.5's schedule."""

CONVENTIONS: Mapping[str, Callable[[int], float]] = MappingProxyType(
    {
        "alignkit": lambda elements: 0.5 / elements,
        "no_half": lambda elements: 1.0 / elements,
        "sum": lambda elements: 1.0,
        "sum_half": lambda elements: 0.5,
        "nats": lambda elements: ELBO_WEIGHTS,
    }
)
"""Convention -> c for beta 1 and latents of so many elements."""


def latent_elements(resolution: int, *, channels: int = 4, factor: int = 8) -> int:
    """D, the elements of a square picture's latent: 65536 at 1024 px, 16384 at 512 px.

    Args:
        resolution: pixels of a side.
        channels: of the latent.
        factor: pixels per latent along a side.

    Raises:
        ConfigError: if `factor` does not divide `resolution`.
    """
    positive("latent_elements", resolution=resolution, channels=channels, factor=factor)
    if resolution % factor:
        raise ConfigError(
            f"resolution must be a multiple of {factor} pixels; got {resolution}. Take "
            f"{max(factor, resolution // factor * factor)}."
        )
    return channels * (resolution // factor) ** 2


def convert_beta(
    beta: float,
    source: str = "alignkit",
    target: str = "alignkit",
    *,
    resolution: int = 1024,
    target_resolution: int | None = None,
) -> float:
    """The beta of another convention, or of another resolution, that weighs squared errors alike.

        convert_beta(2500, "no_half")                            # 5000
        convert_beta(5000, target_resolution=512)                # 1250
        convert_beta(5000, target="nats")                        # 0.0058

    Args:
        beta: in the convention `source` at `resolution`.
        source, target: names of `CONVENTIONS`.
        resolution: pixels of a side that `beta` was meant for.
        target_resolution: those that the result is for; None is the same.

    Raises:
        ConfigError: for a convention that there is not, or a beta that is not positive.
    """
    positive("convert_beta", beta=beta)
    for name in (source, target):
        refuse_unknown("convention of beta", name, CONVENTIONS)
    before = latent_elements(resolution)
    after = before if target_resolution is None else latent_elements(target_resolution)
    return beta * CONVENTIONS[source](before) / CONVENTIONS[target](after)
