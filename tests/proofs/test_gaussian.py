"""The population shift of Diffusion-DPO: a Gaussian diffusion model through `Trainer`, a test
`Family` and the image wing's likelihood.

Data N(0, 1) under the reference, reward x, beta one half. The likelihood's unit is set by the
family's weight: with 1 / (abar (1 - abar)) an error difference is in nats at every timestep, and
DPO must then find the optimum of E[x] - beta KL(N(m, 1) || N(0, 1)), which is m = 1 / beta.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit
from torch import Tensor

from alignkit_diffusion.schedule import Schedule
from tests.ledger import Ledger
from tests.proofs.gaussian import Gaussian, elbo, learnt_shift

BETA = 0.5
ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
"""DDPM's linear schedule (Ho et al. 2020)."""


def one_timestep(kind: str = "epsilon") -> Schedule:
    """Half signal, half noise."""
    return Schedule(torch.tensor([0.5], dtype=torch.float64), kind)


def all_timesteps() -> Schedule:
    return Schedule(torch.from_numpy(ABAR), "epsilon")


def nats(abar: Tensor) -> Tensor:
    return 1 / (abar * (1 - abar))


def constant(abar: Tensor) -> Tensor:
    return torch.full_like(abar, 8.0)


def weights(kind: str) -> np.ndarray:
    """By timestep, up to a factor: min-SNR (Hang et al. 2023) at 5, or the ELBO's own weights
    (Ho et al. 2020), exact as "nats" and held below the tenth as "elbo"."""
    snr = ABAR / (1 - ABAR)
    if kind == "min_snr":
        return np.minimum(snr, 5) / snr
    exact = np.r_[0, (snr[:-1] / snr[1:] - 1) / 2]
    return exact if kind == "nats" else np.r_[np.full(10, exact[10]), exact[10:]]


def minus_log_sigmoid(logit: np.ndarray) -> np.ndarray:
    return -log_expit(logit)


def ipo(logit: np.ndarray) -> np.ndarray:
    return (logit / BETA - 1 / (2 * BETA)) ** 2


def population_shift(
    scale: np.ndarray | float = BETA,
    noise: float = 0.0,
    loss: Callable[[np.ndarray], np.ndarray] = minus_log_sigmoid,
) -> float:
    """argmin over m of E[loss], by quadrature over D = x - y from N(0, 2) and a normal Z.

    Args:
        scale: the logit is scale m D, at each of the timesteps given;
        noise: plus noise m Z.
        loss: of the logit of the labelled pair.
    """
    (d, weight), (z, weight_z) = hermegauss(60), hermegauss(40 if noise else 1)
    d = np.sqrt(2) * d[:, None, None]
    weights = (weight / weight.sum())[:, None, None] * (weight_z / weight_z.sum())[:, None]
    scales = np.atleast_1d(scale)

    def expected(m: float) -> float:
        logit = scales * m * d + noise * m * z[:, None]
        losses = expit(d) * loss(logit) + expit(-d) * loss(-logit)
        return float((weights * losses).sum() / len(scales))

    return minimize_scalar(expected, bounds=(0, 10), method="bounded", options={"xatol": 1e-9}).x


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        name: of the method.
        claim: what the shift is.
        family: the noise and the weights.
        expected: the shift.
        exact: whether nothing in a step is random that the loss could see.
        loss: the name of the loss.
        weighting: of the timesteps, on top of the family's.
    """

    name: str
    claim: str
    family: Gaussian
    expected: Callable[[], float]
    exact: bool
    loss: str = "sigmoid"
    weighting: str = "uniform"


CASES = [
    Case(
        "diffusion-dpo",
        "one timestep in nats: shift 1 / beta, the KL optimum",
        Gaussian(one_timestep(), nats),
        lambda: 1 / BETA,
        exact=True,
    ),
    Case(
        "diffusion-dpo",
        "all timesteps in nats: the same",
        Gaussian(all_timesteps(), nats),
        lambda: 1 / BETA,
        exact=True,
    ),
    Case(
        "diffusion-dpo, v",
        "v at abar one half: errors count 1 / abar, so half of it",
        Gaussian(one_timestep("v_prediction"), nats),
        lambda: 1 / BETA / 2,
        exact=True,
    ),
    Case(
        "diffusion-ipo",
        "one timestep in nats: E[D (2 s(D) - 1)] / (2 beta E[D^2])",
        Gaussian(one_timestep(), nats),
        lambda: population_shift(loss=ipo),
        exact=True,
        loss="ipo",
    ),
    Case(
        "diffusion-dpo",
        "noise not shared within the pair: attenuated",
        Gaussian(one_timestep(), nats, shared=False),
        # weight beta a^3 s (n' - n), with a^3 s = 1/4, weight = 4 and n' - n of variance 2
        lambda: population_shift(noise=BETA * np.sqrt(2)),
        exact=False,
    ),
    Case(
        "diffusion-dpo",
        "all timesteps, constant weight 8: logit 4 abar (1 - abar) m D",
        Gaussian(all_timesteps(), constant),
        lambda: population_shift(8 * BETA * ABAR * (1 - ABAR)),
        exact=False,
    ),
    *(
        Case(
            f"diffusion-dpo, {name}",
            "all timesteps, constant weight 8 and the weighting's of mean 1",
            Gaussian(all_timesteps(), constant),
            lambda name=name: population_shift(
                8 * BETA * weights(name) / weights(name).mean() * ABAR * (1 - ABAR)
            ),
            exact=False,
            weighting=name,
        )
        for name in ("min_snr", "elbo")
    ),
    Case(
        "diffusion-dpo, nats",
        "one timestep of the ELBO in nats: logit 2 T w beta abar (1 - abar) m D",
        Gaussian(all_timesteps(), torch.ones_like),
        lambda: population_shift(2 * 1000 * weights("nats") * BETA * ABAR * (1 - ABAR)),
        exact=False,
        weighting="nats",
    ),
]


def test_the_quadrature_gives_what_is_known_in_closed_form() -> None:
    assert population_shift() == pytest.approx(1 / BETA, abs=1e-6)
    normal, weight = hermegauss(60)
    d = np.sqrt(2) * normal
    mean = (weight * d * (2 * expit(d) - 1)).sum() / weight.sum()
    assert population_shift(loss=ipo) == pytest.approx(mean / (2 * BETA * 2), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}: {case.claim}")
def test_trainer_reaches_the_population_shift(case: Case, ledger: Ledger) -> None:
    ledger.check(
        case.name,
        case.claim,
        got=learnt_shift(
            case.family,
            loss=case.loss,
            beta=BETA,
            steps=300 if case.exact else 500,
            timestep_weighting=case.weighting,
        ),
        expected=case.expected(),
        tolerance=1e-3 if case.exact else 0.02,
        measure="relative",
    )


@pytest.mark.parametrize(("x", "mean", "density"), [(0.7, 0.5, 0.225), (-1.2, 1.0, -1.7)])
def test_the_likelihood_in_nats_is_that_of_the_density(
    x: float, mean: float, density: float, ledger: Ledger
) -> None:
    """ln N(x; mean, 1) - ln N(x; 0, 1), but for the steps that the ELBO makes of the path."""
    assert mean * x - mean**2 / 2 == pytest.approx(density)
    family = Gaussian(all_timesteps(), torch.ones_like)
    spread = 1 - ABAR
    # E (noise - prediction)^2 - that of mean 0, by hand: a^2 s^2 [(x - mean)^2 - x^2].
    by_hand = -(weights("nats") * spread * ABAR * ((x - mean) ** 2 - x**2)).sum()
    found = elbo(family, x, mean) - elbo(family, x, 0.0)
    claim = f"log-ratio at x = {x}, mean {mean} against 0"
    name = "elbo in nats"
    ledger.check(name, f"{claim}: the sum", got=found, expected=by_hand, tolerance=1e-5)
    ledger.check(
        name,
        f"{claim}: that of the density, but for a thousand steps",
        got=found,
        expected=density,
        tolerance=0.01,
        measure="relative",
    )
