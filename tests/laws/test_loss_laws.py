"""The laws of `Loss.laws` over every row of the table: claimed ones hold, others fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignkit.losses import PREFERENCE_LOSSES, PairScores
from tests.builders import pair_scores

Sides = tuple[Tensor, Tensor]
Law = Callable[[Any, PairScores, float, float], Sides]


def step0(row: Any, scores: PairScores, beta: float, c: float) -> Sides:
    zero = torch.zeros_like(scores.policy_chosen)
    still = replace(scores, policy_chosen=zero, policy_rejected=zero, target_margin=None)
    return row(still, beta=beta), torch.full_like(zero, row.at_reference(beta))


def swap(row: Any, scores: PairScores, beta: float, c: float) -> Sides:
    other = PairScores(
        scores.policy_rejected,
        scores.policy_chosen,
        scores.reference_rejected,
        scores.reference_chosen,
        chosen_length=scores.rejected_length,
        rejected_length=scores.chosen_length,
        target_margin=scores.target_margin,
        p_chosen=1 - scores.p_chosen,
    )
    return row(scores, beta=beta), row(other, beta=beta)


def shift(row: Any, scores: PairScores, beta: float, c: float) -> Sides:
    moved = replace(
        scores,
        policy_chosen=scores.policy_chosen + c,
        policy_rejected=scores.policy_rejected + c,
    )
    return row(scores, beta=beta), row(moved, beta=beta)


def scaling(row: Any, scores: PairScores, beta: float, c: float) -> Sides:
    """A function of beta * log_ratio, up to the factor that it has at the reference too."""
    k = 1 + abs(c)
    scaled = replace(
        scores,
        policy_chosen=scores.policy_chosen * k,
        policy_rejected=scores.policy_rejected * k,
    )
    factor = row.at_reference(beta) / row.at_reference(beta / k)
    return row(scores, beta=beta), factor * row(scaled, beta=beta / k)


def batch(row: Any, scores: PairScores, beta: float, c: float) -> Sides:
    def pick(*index: int) -> PairScores:
        chosen = {k: None if v is None else v[list(index)] for k, v in vars(scores).items()}
        return PairScores(**chosen)

    num = len(scores.policy_chosen)
    singles = torch.cat([row(pick(i), beta=beta) for i in range(num)])
    backwards = row(pick(*reversed(range(num))), beta=beta).flip(0)
    assert torch.allclose(backwards, singles, rtol=1e-9, atol=1e-12)
    return row(scores, beta=beta), singles


def p_chosen(row: Any, scores: PairScores, beta: float, c: float) -> Sides:
    sure = replace(scores, p_chosen=None)
    q = scores.p_chosen
    opposite = replace(scores, p_chosen=torch.zeros_like(q))
    return row(scores, beta=beta), q * row(sure, beta=beta) + (1 - q) * row(opposite, beta=beta)


def weight(row: Any, scores: PairScores, beta: float, c: float) -> Sides:
    """Weights are the objective's affair."""
    weighted = replace(scores, weight=torch.linspace(0, 3, len(scores.policy_chosen)).double())
    return row(scores, beta=beta), row(weighted, beta=beta)


LAWS: dict[str, Law] = {
    law.__name__: law for law in (step0, swap, shift, scaling, batch, p_chosen, weight)
}
CASES = [(row, law) for row in PREFERENCE_LOSSES for law in LAWS]
CLAIMED = [case for case in CASES if case[1] in PREFERENCE_LOSSES[case[0]].laws]
NOT_CLAIMED = [case for case in CASES if case not in CLAIMED]

log_ratios = st.floats(-50, 50, allow_nan=False, width=32)


@st.composite
def scores_of_pairs(draw: Any) -> PairScores:
    num = draw(st.integers(1, 4))

    def vector(values: st.SearchStrategy[float]) -> Tensor:
        return torch.tensor(draw(st.lists(values, min_size=num, max_size=num))).double()

    return pair_scores(
        vector(log_ratios),
        vector(log_ratios),
        chosen_length=vector(st.integers(1, 30)),
        rejected_length=vector(st.integers(1, 30)),
        target_margin=vector(st.floats(0, 3)) if draw(st.booleans()) else None,
        p_chosen=vector(st.floats(0, 1)),
    )


def test_rows_claim_only_laws_that_exist() -> None:
    for row in PREFERENCE_LOSSES.values():
        assert row.laws <= set(LAWS), row.name


@pytest.mark.parametrize(("name", "law"), CLAIMED)
def test_a_claimed_law_holds(name: str, law: str) -> None:
    @settings(max_examples=40, deadline=None, database=None, derandomize=True)
    @given(scores_of_pairs(), st.floats(0.01, 5), st.floats(-20, 20))
    def holds(scores: PairScores, beta: float, c: float) -> None:
        left, right = LAWS[law](PREFERENCE_LOSSES[name], scores, beta, c)
        torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-7)

    holds()


@pytest.mark.parametrize(("name", "law"), NOT_CLAIMED)
def test_a_law_that_is_not_claimed_fails(name: str, law: str) -> None:
    scores = pair_scores(
        [3.0, -1.0],
        [-2.0, 0.5],
        chosen_length=[4.0, 7.0],
        rejected_length=[9.0, 2.0],
        p_chosen=[0.8, 0.3],
    )
    left, right = LAWS[law](PREFERENCE_LOSSES[name], scores, 0.3, 1.7)
    assert not torch.allclose(left, right, rtol=1e-4, atol=1e-4)


def test_the_papers_ipo_obeys_the_shift_law_that_averages_break() -> None:
    def summed(scores: PairScores, beta: float) -> Tensor:
        return PREFERENCE_LOSSES["ipo"](scores, beta=beta, average=False)

    scores = pair_scores([3.0, -1.0], [-2.0, 0.5])
    torch.testing.assert_close(*shift(summed, scores, 0.3, 1.7), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(scores_of_pairs(), st.floats(-20, 20))
def test_policy_and_reference_enter_by_their_ratio_only(
    name: str, scores: PairScores, c: float
) -> None:
    row = PREFERENCE_LOSSES[name]
    for side in ("chosen", "rejected"):
        moved = replace(
            scores,
            **{
                f"{who}_{side}": getattr(scores, f"{who}_{side}") + c
                for who in ("policy", "reference")
            },
        )
        expected = row(scores, beta=0.3)
        torch.testing.assert_close(row(moved, beta=0.3), expected, rtol=1e-7, atol=1e-7)
