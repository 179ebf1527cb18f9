"""Conversions of beta against the logit that each convention computes."""

from __future__ import annotations

import pytest
import torch

import alignkit
from alignkit.betas import CONVENTIONS, convert_beta, latent_elements
from alignkit.errors import ConfigError


def logit(convention: str, beta: float, errors: torch.Tensor) -> float:
    """From squared errors (4, D) of policy and reference on winner and loser, as written there."""
    mean, total = errors.double().mean(1), errors.double().sum(1)
    by = {
        "alignkit": -0.5 * beta * ((mean[0] - mean[2]) - (mean[1] - mean[3])),
        "no_half": -beta * ((mean[0] - mean[2]) - (mean[1] - mean[3])),
        "sum": -beta * ((total[0] - total[2]) - (total[1] - total[3])),
        "sum_half": -0.5 * beta * ((total[0] - total[2]) - (total[1] - total[3])),
        # The ELBO in nats with flat weights: T D w_t times the mean error, T w_t = 6.53.
        "nats": -beta * 6.53 * ((total[0] - total[2]) - (total[1] - total[3])),
    }
    return float(by[convention])


@pytest.mark.parametrize("source", CONVENTIONS)
@pytest.mark.parametrize("target", CONVENTIONS)
def test_a_converted_beta_gives_the_same_logit(source: str, target: str) -> None:
    elements = latent_elements(64)
    errors = torch.rand(4, elements, generator=torch.Generator().manual_seed(0))
    converted = convert_beta(300.0, source, target, resolution=64)
    assert logit(target, converted, errors) == pytest.approx(logit(source, 300.0, errors))


def test_published_figures() -> None:
    assert alignkit.convert_beta(2500, "no_half") == 5000
    assert convert_beta(5000, target_resolution=512) == 1250
    assert convert_beta(5000, target="nats") == pytest.approx(0.0058, rel=0.02)
    assert convert_beta(5000, target="nats", resolution=512) == pytest.approx(0.023, rel=0.02)
    assert convert_beta(2000, target="nats", resolution=512) == pytest.approx(0.0093, rel=0.02)
    assert convert_beta(5000, target="sum") == pytest.approx(0.0381, rel=2e-3)
    assert convert_beta(convert_beta(7.0, "sum", "nats"), "nats", "sum") == pytest.approx(7.0)


def test_what_cannot_be_converted() -> None:
    with pytest.raises(ConfigError, match=r"Unknown convention of beta 'summed'.*'sum'"):
        convert_beta(1.0, "summed")
    with pytest.raises(ConfigError, match="multiple of 8"):
        convert_beta(1.0, resolution=1023)
    with pytest.raises(ConfigError, match="beta"):
        convert_beta(-1.0)
