"""The laws of `Loss.laws` over every row of every table: claimed ones hold, others fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.losses import (
    LOSSES,
    PREFERENCE_LOSSES,
    GroupLoss,
    GroupScores,
    Loss,
    PairLoss,
    PairScores,
    UnpairedScores,
)
from tests.builders import pair_scores
from tests.laws.loss_laws import LAWS, PAIRS_ONLY, answers, rows_of, shift, size

CASES = [
    (name, law)
    for name, row in LOSSES.items()
    for law in LAWS
    if isinstance(row, PairLoss) or law not in PAIRS_ONLY
]
CLAIMED = [case for case in CASES if case[1] in LOSSES[case[0]].laws]
NOT_CLAIMED = [case for case in CASES if case not in CLAIMED]

QUICK = settings(max_examples=12, deadline=None, database=None, derandomize=True)


def vector(draw: Any, values: st.SearchStrategy[float], num: int) -> Tensor:
    return torch.tensor(draw(st.lists(values, min_size=num, max_size=num))).double()


@st.composite
def scores_for(draw: Any, row: Loss, far: float = 50, least: int = 1) -> Any:
    """Scores of the row's kind with every field that it takes."""
    num = draw(st.integers(least, 4))
    logps, share = st.floats(-far, far, width=32), st.floats(0, 1)
    length = st.integers(1, 30)
    if isinstance(row, PairLoss):
        fields = {
            "target_margin": vector(draw, st.floats(0, 3), num) if draw(st.booleans()) else None,
            "p_chosen": vector(draw, share, num),
        }
        better = vector(draw, st.floats(0.1, 4), num)
        worse = vector(draw, st.floats(-2, 2), num)
        return PairScores(
            *(vector(draw, logps, num) for _ in range(4)),
            chosen_length=vector(draw, length, num),
            rejected_length=vector(draw, length, num),
            score_chosen=worse + better,
            score_rejected=worse,
            uniform=vector(draw, st.floats(0, 1, exclude_max=True), num),
            **{name: value for name, value in fields.items() if name not in row.refuses},
        )
    if isinstance(row, GroupLoss):
        k = draw(st.integers(2, 5))

        def table(values: st.SearchStrategy[float]) -> Tensor:
            return vector(draw, values, num * k).reshape(num, k)

        mask = table(share) < 0.8
        mask[:, :2] = True
        rank = table(st.integers(-1, k - 1)).long()
        return GroupScores(table(logps), table(logps), rank, mask, length=table(length))
    return UnpairedScores(
        vector(draw, logps, num),
        vector(draw, logps, num),
        vector(draw, st.integers(0, 1), num).bool(),
        length=vector(draw, length, num),
        kl=vector(draw, logps, num),
    )


def example(row: Loss) -> Any:
    """Scores on which a law that does not hold shows it."""
    draw = torch.Generator().manual_seed(3)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).double() * 3

    if isinstance(row, PairLoss):
        fields = {
            "target_margin": torch.tensor([0.3, 0.9, 0.1]),
            "p_chosen": torch.tensor([0.8, 0.3, 0.9]),
        }
        return PairScores(
            *(numbers(3) for _ in range(4)),
            chosen_length=torch.tensor([4.0, 7.0, 2.0]).double(),
            rejected_length=torch.tensor([9.0, 2.0, 5.0]).double(),
            score_chosen=torch.tensor([1.0, 4.0, 2.0]).double(),
            score_rejected=torch.tensor([-1.0, 3.5, 0.5]).double(),
            uniform=torch.tensor([0.1, 0.95, 0.5]).double(),
            **{name: value.double() for name, value in fields.items() if name not in row.refuses},
        )
    if isinstance(row, GroupLoss):
        rank = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 0, -1]])
        return GroupScores(numbers(3, 3), numbers(3, 3), rank, torch.ones(3, 3).bool())
    liked = torch.tensor([True, False, True])
    return UnpairedScores(numbers(3), numbers(3), liked, length=numbers(3), kl=numbers(3) + 2)


def test_rows_claim_only_laws_that_exist() -> None:
    for row in LOSSES.values():
        assert row.laws <= set(LAWS), row.name
        assert isinstance(row, PairLoss) or not row.laws & PAIRS_ONLY, row.name
        assert not row.coupled or "batch" not in row.laws, row.name
        assert row.scale_free == ("scaling" in row.laws), row.name
        assert row.needs_reference == (row.at_reference is not None), row.name


@pytest.mark.parametrize(("name", "law"), CLAIMED)
def test_a_claimed_law_holds(name: str, law: str) -> None:
    row = LOSSES[name]

    @QUICK
    @given(scores_for(row), st.floats(0.01, 5), st.floats(-20, 20))
    def holds(scores: Any, beta: float, c: float) -> None:
        left, right = LAWS[law](row, scores, beta, c)
        torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-7)

    holds()


@pytest.mark.parametrize(("name", "law"), NOT_CLAIMED)
def test_a_law_that_is_not_claimed_fails(name: str, law: str) -> None:
    row = LOSSES[name]
    scores = example(row)
    if law in PAIRS_ONLY and "p_chosen" in row.refuses:
        with pytest.raises(ConfigError, match=f"'{name}' does not take p_chosen"):
            row(replace(scores, p_chosen=torch.rand(3)), beta=0.3)
        return
    if law == "step0" and row.at_reference is None:
        assert not row.needs_reference
        return
    left, right = LAWS[law](row, scores, 0.3, 1.7)
    assert not torch.allclose(left, right, rtol=1e-4, atol=1e-4)


def test_the_papers_ipo_obeys_the_shift_law_that_averages_break() -> None:
    def summed(scores: PairScores, beta: float) -> Tensor:
        return PREFERENCE_LOSSES["ipo"](scores, beta=beta, average=False)

    scores = pair_scores([3.0, -1.0], [-2.0, 0.5])
    torch.testing.assert_close(*shift(summed, scores, 0.3, 1.7), rtol=1e-9, atol=1e-9)


def tied(scores: PairScores) -> bool:
    sorted_by = (
        scores.chosen,
        scores.rejected,
        scores.policy_chosen - scores.policy_rejected,
        scores.reference_chosen - scores.reference_rejected,
    )
    return any(len(values.unique()) < len(values) for values in sorted_by)


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_the_examples_changes_nothing(name: str) -> None:
    """Also where they are coupled, and in the gradient of the whole batch."""
    row = LOSSES[name]

    @QUICK
    @given(scores_for(row, least=2), st.randoms(use_true_random=False))
    def holds(scores: Any, random: Any) -> None:
        # Sorted losses have one gradient among several at a tie; it goes by the order.
        assume(not name.startswith("aot") or not tied(scores))
        order = list(range(size(scores)))
        random.shuffle(order)
        loss, slopes = gradients(row, leaves(scores, torch.float64), 0.3)
        mixed = leaves(rows_of(scores, order), torch.float64)
        other, other_slopes = gradients(row, mixed, 0.3)
        torch.testing.assert_close(other.sum(), loss.sum(), rtol=1e-9, atol=1e-9)
        for one, two in zip(slopes, other_slopes, strict=True):
            torch.testing.assert_close(two, one[order], rtol=1e-7, atol=1e-7)

    holds()


def leaves(scores: Any, dtype: torch.dtype) -> Any:
    """The same scores in `dtype`, the policy's with gradients."""
    cast = {
        k: v.to(dtype) for k, v in vars(scores).items() if v is not None and v.is_floating_point()
    }
    for policy, _ in answers(scores):
        cast[policy] = cast[policy].clone().requires_grad_()
    return replace(scores, **cast)


def gradients(row: Loss, scores: Any, beta: float) -> tuple[Tensor, list[Tensor]]:
    loss = row(scores, beta=beta)
    leaf = [getattr(scores, policy) for policy, _ in answers(scores)]
    found = torch.autograd.grad(loss.sum(), leaf, allow_unused=True)
    return loss.detach(), [g for g in found if g is not None]


@pytest.mark.parametrize("name", LOSSES)
def test_float32_is_float64_within_its_precision(name: str) -> None:
    row = LOSSES[name]
    # Images' log-likelihoods are minus half a mean squared error.
    far = 20 if "text" in row.modalities else 0.5

    @QUICK
    @given(scores_for(row, far=far), st.floats(0.05, 2))
    def holds(scores: Any, beta: float) -> None:
        # Numbers that float32 has too, so that both start alike.
        scores = leaves(leaves(scores, torch.float32), torch.float64)
        loss, slopes = gradients(row, scores, beta)
        single, single_slopes = gradients(row, leaves(scores, torch.float32), beta)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), loss, rtol=2e-5, atol=2e-5 * scale(loss))
        for one, other in zip(single_slopes, slopes, strict=True):
            torch.testing.assert_close(
                one.double(), other, rtol=1e-3, atol=1e-4 * scale(other), check_dtype=False
            )

    holds()


def scale(values: Tensor) -> float:
    return max(1.0, values.abs().max().item())


@pytest.mark.parametrize("name", LOSSES)
def test_finite_at_large_log_ratios_in_float32(name: str) -> None:
    row = LOSSES[name]

    @QUICK
    @given(scores_for(row, far=1e4, least=2), st.sampled_from([0.1, 1.0, 5000.0]))
    def holds(scores: Any, beta: float) -> None:
        far = {policy: getattr(scores, policy).sign() * 1e4 for policy, _ in answers(scores)}
        near = {reference: getattr(scores, reference) * 0 for _, reference in answers(scores)}
        loss, slopes = gradients(row, leaves(replace(scores, **far, **near), torch.float32), beta)
        assert loss.isfinite().all() and slopes
        assert all(slope.isfinite().all() for slope in slopes)

    holds()
