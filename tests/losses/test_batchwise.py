"""Losses that couple the pairs of the global batch, against hand-worked and brute-force values."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.losses import PREFERENCE_LOSSES
from tests.builders import pair_scores
from tests.losses.examples import DTYPES, batch3


def past(mean: float, std: float) -> dict[str, torch.Tensor]:
    """A state of beta-DPO whose running means are these."""
    numbers = {"mean.sum": mean, "mean.mass": 1.0, "std.sum": std, "std.mass": 1.0}
    return {name: torch.tensor(value).double() for name, value in numbers.items()}


GOLDENS = [
    ("aot", {}, 0.7312573),
    ("aot_unpaired", {}, 0.7300177),
    # Effective beta 0.1 (1 + 0.6 (-2/3 + 1)) = 0.12.
    ("beta_dpo", {"rho": 0.0, "state": past(-1.0, 1.0)}, 0.7560098),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "keywords", "golden"), GOLDENS)
def test_batch_of_three(name, keywords, golden, dtype) -> None:
    found = PREFERENCE_LOSSES[name](batch3(dtype), beta=0.1, **keywords)
    assert found.shape == (3,) and found.dtype == dtype
    assert found.mean().item() == pytest.approx(golden, rel=DTYPES[dtype])


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_a_row_of_a_coupled_loss_is_the_pair_it_moves(name) -> None:
    """The gradient of row i's loss reaches the policy's chosen answer of pair i alone."""
    scores = batch3()
    scores.policy_chosen.requires_grad_()
    loss = PREFERENCE_LOSSES[name](scores, beta=0.1)
    for i in range(3):
        (slope,) = torch.autograd.grad(loss[i], scores.policy_chosen, retain_graph=True)
        assert slope[i] < 0 and slope.count_nonzero() == 1


def test_beta_dpo_carries_running_means_that_start_at_the_first_batch() -> None:
    row = PREFERENCE_LOSSES["beta_dpo"]
    first, second = batch3(), pair_scores([1.0, 2.0, 6.0], [0.0, 0.0, 0.0])
    state = row.next_state(first, {}, beta=0.1)
    # h = [4, -1.5, -4.5]: mean -2/3, sample deviation sqrt(((14/3)^2 + (5/6)^2 + (23/6)^2) / 2).
    assert (state["mean.sum"] / state["mean.mass"]).item() == pytest.approx(-2 / 3)
    assert (state["std.sum"] / state["std.mass"]).item() == pytest.approx(math.sqrt(223 / 12))
    state = row.next_state(second, state, beta=0.1)
    # 0.9 of the past, corrected for the start: (0.09 * -2/3 + 0.1 * 3) / 0.19.
    assert (state["mean.sum"] / state["mean.mass"]).item() == pytest.approx(0.24 / 0.19)
    wished = 0.1 * (1 + 0.6 * (3 - 0.24 / 0.19))
    found = row(second, beta=0.1, rho=0.0, state=state)
    plain = PREFERENCE_LOSSES["sigmoid"](second, beta=wished)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)


def test_beta_dpo_without_a_state_is_its_first_step() -> None:
    row = PREFERENCE_LOSSES["beta_dpo"]
    state = row.next_state(batch3(), {}, beta=0.1)
    first = row(batch3(), beta=0.1, rho=0.0, state=state)
    assert torch.equal(row(batch3(), beta=0.1, rho=0.0), first)


def test_beta_dpo_floors_its_beta() -> None:
    found = PREFERENCE_LOSSES["beta_dpo"](batch3(), beta=0.1, rho=0.0, state=past(1e4, 1.0))
    floor = PREFERENCE_LOSSES["sigmoid"](batch3(), beta=1e-3)
    torch.testing.assert_close(found, floor, rtol=1e-12, atol=1e-12)


def test_beta_dpo_draws_pairs_in_proportion_to_their_weights() -> None:
    """One of three pairs is kept: frequencies are exp(-((h - M0) / S)^2 / 2), normalised."""
    draws, wanted = 1000, torch.tensor([4.0, -1.5, -4.5])
    uniform = torch.rand(draws, 3, generator=torch.Generator().manual_seed(0)).double()
    row, state = PREFERENCE_LOSSES["beta_dpo"], past(-1.0, 3.0)
    kept = torch.zeros(3)
    for u in uniform:
        loss = row(batch3(uniform=u), beta=0.1, rho=0.6, state=state)
        assert (loss > 0).sum() == 1
        kept += loss > 0
    expected = torch.exp(-0.5 * ((wanted + 1) / 3) ** 2)
    expected = expected / expected.sum()
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((kept / draws - expected).abs() < 4 * deviation).all()


def test_beta_dpo_s_means_are_weighted() -> None:
    """Weight 0 is "row absent", weight 2 "row twice", where no pair is left out by chance."""
    row = PREFERENCE_LOSSES["beta_dpo"]
    weighted = batch3(weight=[1, 2, 0])
    twice = pair_scores([3.0, 0, 0], [-1.0, 1.5, 1.5])
    one, two = (row.next_state(scores, {}, beta=0.1) for scores in (weighted, twice))
    assert all(torch.allclose(one[name], two[name], rtol=1e-12) for name in two)
    held = past(-1.0, 1.0)
    found = row(weighted, beta=0.1, rho=0.0, state=held)
    wanted = row(twice, beta=0.1, rho=0.0, state=held)
    assert (found * weighted.weight).sum().item() == pytest.approx(wanted.sum().item(), rel=1e-9)


def test_beta_dpo_s_kept_pairs_set_its_beta_and_carry_the_mean() -> None:
    state = past(-1.0, 3.0)
    # Certain arrivals: a uniform number near 1 comes last, one near 0 first.
    scores = batch3(uniform=torch.tensor([0.0, 0.0, 1 - 1e-9]).double())
    found = PREFERENCE_LOSSES["beta_dpo"](scores, beta=0.1, rho=0.34, state=state)
    effective = 0.1 * (1 + 0.6 * ((4 - 1.5) / 2 + 1))
    plain = PREFERENCE_LOSSES["sigmoid"](batch3(), beta=effective)
    assert found[2] == 0
    torch.testing.assert_close(found.mean(), plain[:2].mean(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [-0.1, 1.0])
def test_beta_dpo_refuses_a_share_outside_its_range(bad) -> None:
    with pytest.raises(ConfigError, match="rho"):
        PREFERENCE_LOSSES["beta_dpo"](batch3(), beta=0.1, rho=bad)
    with pytest.raises(ValueError, match="needs `uniform`"):
        PREFERENCE_LOSSES["beta_dpo"](batch3(), beta=0.1)


@pytest.mark.parametrize("field", ["p_chosen", "target_margin"])
@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_sorted_losses_refuse_what_has_no_meaning_by_rank(name, field) -> None:
    scores = replace(batch3(), **{field: torch.ones(3).double()})
    with pytest.raises(ConfigError, match=f"'{name}' does not take {field}: .* rank"):
        PREFERENCE_LOSSES[name](scores, beta=0.1)
