"""Rewards per token, advantages and returns: goldens, a float64 loop, and what must not matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from alignkit.losses.advantages import (
    discounted_returns,
    explained_variance,
    gae,
    group_normalised,
    last_token,
    leave_one_out,
    shape_rewards,
)

ALL = torch.ones(1, 3, dtype=torch.bool)


def row(*values: float) -> Tensor:
    return torch.tensor([values])


@pytest.mark.parametrize(
    ("lam", "expected"),
    [(0.0, [-0.2, 0.2, 0.7]), (0.95, [0.62175, 0.865, 0.7]), (1.0, [0.7, 0.9, 0.7])],
)
def test_gae_goldens(lam, expected) -> None:
    rewards, values = row(-0.1, -0.2, 1.5), row(0.5, 0.4, 0.8)
    advantages, returns = gae(rewards, values, ALL, lam=lam)
    assert advantages[0].tolist() == pytest.approx(expected)
    assert returns[0].tolist() == pytest.approx((advantages + values)[0].tolist())
    if lam == 1:
        assert returns[0].tolist() == pytest.approx([1.2, 1.3, 1.5]), "the reward to go"


def test_defect_7_cut_answers_are_treated_as_ended() -> None:
    """Defect 7: a cut answer has not ended."""
    rewards, values = row(0.0, 0.0, 1.0), row(0.5, 0.4, 0.8)
    ended, _ = gae(rewards, values, ALL, bootstrap=torch.tensor([0.0]))
    assert ended[0].tolist() == pytest.approx([0.4605, 0.59, 0.2])
    cut, _ = gae(rewards, values, ALL, bootstrap=torch.tensor([0.6]))
    assert cut[0].tolist() == pytest.approx([1.002, 1.16, 0.8])


def by_loops(rewards, values, lengths, gamma, lam, bootstrap) -> np.ndarray:
    """A_t as the sum over k of (gamma lam)^k delta_{t+k}: the definition, in float64."""
    found = np.zeros(rewards.shape)
    for n, length in enumerate(lengths):
        after = np.append(values[n, :length], bootstrap[n]) if length else np.zeros(1)
        deltas = [rewards[n, t] + gamma * after[t + 1] - after[t] for t in range(length)]
        for t in range(length):
            found[n, t] = sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t))
    return found


def ragged(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    lengths = [4, 1, 6, 0, 3]
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor(lengths).unsqueeze(1)
    rewards, values = torch.randn(2, 5, 6, generator=draw, dtype=torch.float64)
    return rewards, values, mask, torch.randn(5, generator=draw, dtype=torch.float64), lengths


def test_gae_of_ragged_answers_is_its_definition() -> None:
    rewards, values, mask, bootstrap, lengths = ragged()
    found, returns = gae(rewards, values, mask, gamma=0.9, lam=0.7, bootstrap=bootstrap)
    arrays = (rewards.numpy(), values.numpy(), lengths, 0.9, 0.7, bootstrap.numpy())
    np.testing.assert_allclose(found.numpy(), by_loops(*arrays), atol=1e-12)
    assert (found[~mask] == 0).all() and (returns[~mask] == 0).all()
    monte_carlo = discounted_returns(rewards, mask, gamma=0.9, bootstrap=bootstrap)
    zeros = np.zeros(values.shape)
    # With no values but the last, the definition at lam 1 is the discounted sum itself.
    arrays = (rewards.numpy(), zeros, lengths, 0.9, 1.0, bootstrap.numpy())
    np.testing.assert_allclose(monte_carlo.numpy(), by_loops(*arrays), atol=1e-12)


def test_defect_13_masked_positions_leak_into_advantages() -> None:
    """Defects 12 and 13: what is masked may hold anything, and rows do not meet."""
    rewards, values, mask, bootstrap, _ = ragged()
    found, _ = gae(rewards, values, mask, bootstrap=bootstrap)
    wide = torch.nn.functional.pad
    nan = float("nan")
    dirty = [wide(torch.where(mask, x, nan), (0, 6), value=nan) for x in (rewards, values)]
    padded, _ = gae(*dirty, wide(mask, (0, 6)), bootstrap=bootstrap)
    assert torch.equal(padded[:, :6], found) and (padded[:, 6:] == 0).all()
    alone = [
        gae(rewards[n : n + 1], values[n : n + 1], mask[n : n + 1], bootstrap=bootstrap[n : n + 1])
        for n in range(5)
    ]
    assert torch.equal(torch.cat([advantages for advantages, _ in alone]), found)


def test_defect_5_score_one_token_late() -> None:
    """Defect 5: not one token late, and never on padding."""
    mask = torch.tensor([[True, True, True, False], [True, False, False, False], [False] * 4])
    log_ratios = torch.full((3, 4), 0.5).masked_fill(~mask, float("nan"))
    rewards = shape_rewards(torch.tensor([2.0, -1.0, 9.0]), log_ratios, mask, kl_coef=0.1)
    expected = [[-0.05, -0.05, 1.95, 0], [-1.05, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(rewards.numpy(), expected, atol=1e-6)
    assert last_token(mask).tolist() == [
        [False, False, True, False],
        [True] + [False] * 3,
        [False] * 4,
    ]
    total = rewards.sum(1) + 0.1 * torch.where(mask, log_ratios, 0.0).sum(1)
    assert total.tolist() == pytest.approx([2.0, -1.0, 0.0])


def test_returns_hold_the_kl_of_later_tokens() -> None:
    """The first token of the two-token tree: its optimum is 0.429 with the KL of the second token
    in its return, and 0.193 without."""
    first, second = np.array([0.7, 0.3]), np.array([[0.6, 0.4], [0.2, 0.8]])
    score, beta = np.array([[0.0, 1.0], [2.0, -1.0]]), 0.5
    joint = first[:, None] * second * np.exp(score / beta)
    policy = joint / joint.sum()
    marginal, conditional = policy.sum(1), policy / policy.sum(1, keepdims=True)
    assert marginal[0] == pytest.approx(0.429326, abs=1e-6)
    log_ratios = np.stack(
        [
            np.broadcast_to(np.log(marginal / first)[:, None], (2, 2)),
            np.log(conditional / second),
        ],
        -1,
    ).reshape(4, 2)
    mask = torch.ones(4, 2, dtype=torch.bool)
    rewards = shape_rewards(
        torch.tensor(score.flatten()), torch.tensor(log_ratios), mask, kl_coef=beta
    )
    returns = discounted_returns(rewards, mask)
    # At the optimum every answer's return is beta ln Z, from either token on.
    assert returns[:, 0].tolist() == pytest.approx([beta * np.log(joint.sum())] * 4)
    soft = beta * np.log((second * np.exp(score / beta)).sum(1))
    assert returns[:, 1].tolist() == pytest.approx(np.repeat(soft, 2).tolist())


GROUP = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.5]])


def test_group_goldens() -> None:
    assert leave_one_out(GROUP)[0].tolist() == pytest.approx([0.625, -0.625, -0.625, 0.625, 0])
    normalised = group_normalised(GROUP)[0].tolist()
    assert normalised == pytest.approx([1.118034, -1.118034, -1.118034, 1.118034, 0], abs=1e-6)
    plain = group_normalised(GROUP, divide=False)[0].tolist()
    assert plain == pytest.approx([0.5, -0.5, -0.5, 0.5, 0])


def test_defect_8_groups_without_variance() -> None:
    """Defect 8: equal scores give zeros, not NaN."""
    for equal in (torch.full((2, 4), 0.3), torch.tensor([[2.0]])):
        assert (leave_one_out(equal) == 0).all() and (group_normalised(equal) == 0).all()


def test_a_missing_score_is_left_out_and_never_0() -> None:
    nan = float("nan")
    scores = torch.tensor([[1.0, nan, 0.0, 1.0, 0.5], [nan, 2.0, nan, nan, nan]])
    present = ~scores.isnan()
    found = leave_one_out(scores, present)
    without = leave_one_out(torch.tensor([[1.0, 0.0, 1.0, 0.5]]))
    assert torch.equal(found[0, [0, 2, 3, 4]], without[0])
    assert found[0, 1] == 0 and (found[1] == 0).all()
    assert torch.equal(
        group_normalised(scores, present)[0, [0, 2, 3, 4]],
        group_normalised(torch.tensor([[1.0, 0.0, 1.0, 0.5]]))[0],
    )


def test_leave_one_out_has_the_exact_gradient_in_the_mean() -> None:
    """Over all draws of three answers from three arms, weighted by their probabilities."""
    policy = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    score = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    draws = torch.cartesian_prod(*[torch.arange(3)] * 3)
    chance = policy[draws].prod(1)
    advantages = leave_one_out(score[draws])
    slopes = torch.eye(3, dtype=torch.float64)[draws] - policy  # d ln p(arm) / d logits
    mean = (chance[:, None] * (advantages.unsqueeze(-1) * slopes).mean(1)).sum(0)
    exact = policy * (score - policy @ score)
    assert torch.allclose(mean, exact, atol=1e-12)
    assert torch.allclose(advantages.mean(1), torch.zeros(27, dtype=torch.float64), atol=1e-12)


def test_explained_variance() -> None:
    returns = torch.tensor([[1.0, 2.0, 4.0, 9e9]])
    mask = torch.tensor([[True, True, True, False]])
    dirty = torch.tensor([[1.0, 2.0, 4.0, float("nan")]])
    assert explained_variance(dirty, returns, mask).item() == pytest.approx(1)
    assert explained_variance(torch.full((1, 4), 7.0), returns, mask).item() == pytest.approx(0)
    # Residuals 0, 0, 1: variance 2/9 of 14/9.
    one_off = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    assert explained_variance(one_off, returns, mask).item() == pytest.approx(1 - 2 / 14)
