"""What a token is credited with: the order of scores, cuts, penalties and baselines, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from alignkit import A2C, GRPO, PPO, REINFORCE, RLOO
from alignkit.credit import Looked, credit, settled_scores
from alignkit.running import RunningMoments

NAN = float("nan")
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
OLD = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -1.5, 9.0], [-0.3, 9.0, 9.0], [-1.0, -1.0, -1.0]])
REFERENCE = torch.tensor(
    [[-1.1, -1.8, -0.7], [-1.0, -1.0, -9.0], [-0.5, -9.0, -9.0], [-1.0, -1.0, -1.0]]
)
VALUES = torch.tensor([[0.5, 0.4, 0.8], [0.1, 0.2, 7.0], [0.3, 7.0, 7.0], [0.5, 0.4, 0.8]])
ENDED = torch.tensor([True, True, True, False])


def looked(**changed: Any) -> Looked:
    """Four answers, the last one cut; padding holds rubbish."""
    return replace(
        Looked(
            scores=torch.tensor([1.0, 0.0, 2.0, 3.0]),
            ended=ENDED,
            mask=MASK,
            old_logps=OLD,
            reference_logps=REFERENCE,
            values=VALUES,
            final_values=torch.tensor([5.0, 5.0, 5.0, 0.6]),
        ),
        **changed,
    )


PLAIN: dict[str, Any] = {"whiten_advantages": False}


def test_a_cut_answer_is_bootstrapped_by_what_the_critic_says_after_its_last_token() -> None:
    """lam 1: advantage = 0.6 - V, and the score of an answer that has not ended is nowhere."""
    found = credit(PPO(kl_coef=0.1, lam=1.0, **PLAIN), looked(), 0.1, None)
    assert torch.allclose(found.advantages[3], 0.6 - VALUES[3])
    # Ended: the KL of later tokens and the score, less the value. By hand for the last token.
    assert float(found.advantages[0, 2]) == pytest.approx(1.0 - 0.1 * 0.2 - 0.8)
    assert float(found.advantages[0, 0]) == pytest.approx(
        1.0 - 0.1 * (0.1 - 0.2 + 0.2) - 0.5, abs=1e-6
    )


@pytest.mark.parametrize(
    ("method", "score"),
    [
        (PPO(truncation="as_end"), 3.0),
        (PPO(truncation="as_end", missing_eos_penalty=0.5), 2.5),
        (PPO(truncation="penalty"), -1.0),
        (PPO(truncation="penalty", missing_eos_penalty=0.25), -0.25),
        (PPO(), 0.0),
        (PPO(missing_eos_penalty=0.5), -0.5),
        (PPO(truncation="as_end", score_clip=1.5), 1.5),
    ],
)
def test_defect_07_truncated_answers_are_not_ended_ones(method: PPO, score: float) -> None:
    found, _ = settled_scores(method, looked(), None)
    assert found[3] == score
    assert found[:3].tolist() == [1.0, 0.0, 1.5 if method.score_clip else 2.0]


def test_scores_are_normalised_by_all_so_far_and_then_clipped() -> None:
    running = RunningMoments()
    running.update(torch.tensor([-1.0, 1.0]))
    method = PPO(truncation="as_end", normalize_scores=True, score_clip=1.0)
    found, beyond = settled_scores(method, looked(), running)
    values = torch.tensor([-1.0, 1.0, 1.0, 0.0, 2.0, 3.0])
    expected = (torch.tensor([1.0, 0.0, 2.0, 3.0]) - values.mean()) / values.std(correction=0)
    assert torch.allclose(found, expected.clamp(-1, 1))
    assert beyond.tolist() == (expected.abs() > 1).float().tolist()


def test_defect_13_what_stands_in_padding_changes_nothing() -> None:
    def filled(table: torch.Tensor) -> torch.Tensor:
        return torch.where(MASK, table, NAN)

    method = PPO(kl_coef=0.1, whiten_rewards=True)
    clean = credit(method, looked(), 0.1, None)
    dirty = looked(old_logps=filled(OLD), reference_logps=filled(REFERENCE), values=filled(VALUES))
    found = credit(method, dirty, 0.1, None)
    assert torch.equal(found.advantages, clean.advantages)
    assert torch.equal(found.returns, clean.returns)
    assert found.advantages[~MASK].eq(0).all()


def test_advantages_are_whitened_over_the_real_tokens_of_the_rollout() -> None:
    found = credit(PPO(), looked(), 0.05, None).advantages[MASK].double()
    assert float(found.mean()) == pytest.approx(0, abs=1e-6)
    assert float(found.std(correction=0)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("method", [PPO(), REINFORCE(), RLOO(samples_per_prompt=2)])
def test_a_missing_score_is_left_out_and_is_not_0(method: Any) -> None:
    """The others are credited as if the answer had not been written."""
    samples = method.samples_per_prompt
    scores = torch.tensor([1.0, 0.0, NAN, 3.0])
    found = credit(method, looked(scores=scores, samples=samples), 0.05, None)
    assert not found.mask[2].any() and found.advantages[2].eq(0).all()
    assert found.mask[[0, 1, 3]].equal(MASK[[0, 1, 3]])
    if samples == 1:
        rest = [0, 1, 3]
        tables = {
            name: getattr(looked(), name)[rest]
            for name in ("ended", "mask", "old_logps", "reference_logps", "values", "final_values")
        }
        alone = credit(method, looked(scores=scores[rest], **tables), 0.05, None)
        assert torch.allclose(found.advantages[rest], alone.advantages, atol=1e-6)


def test_reinforce_takes_off_the_mean_return_of_the_others() -> None:
    """By hand, without a KL: scores 1, 0, 2, 3."""
    found = credit(REINFORCE(kl_coef=0.0), looked(reference_logps=None), 0.0, None).advantages
    expected = [1 - 5 / 3, 0 - 6 / 3, 2 - 4 / 3, 3 - 3 / 3]
    assert torch.allclose(found[:, 0], torch.tensor(expected))


def test_answers_as_single_actions() -> None:
    """RLOO: R less the other's; GRPO: in units of the group's spread. R holds the KL of k1."""
    sums = torch.where(MASK, OLD - REFERENCE, 0.0).sum(-1)
    total = torch.tensor([1.0, 0.0, 2.0, 3.0]) - 0.5 * sums
    rloo = credit(RLOO(samples_per_prompt=2), looked(samples=2), 0.5, None).advantages
    apart = torch.stack([total[0] - total[1], total[1] - total[0]])
    assert torch.allclose(rloo[:2, 0], apart, atol=1e-6)
    grpo = credit(GRPO(samples_per_prompt=2), looked(samples=2), 0.5, None).advantages
    # Its KL is in the loss, and scores alone are compared.
    assert torch.allclose(grpo[:, 0], torch.tensor([1.0, -1.0, -1.0, 1.0]))
    assert torch.equal(grpo[0, MASK[0]], grpo[0, :1].expand(3))


def test_defect_05_the_score_stands_on_the_last_real_token() -> None:
    """A critic of zeros and lam 0: only the last token of each answer hears of the score."""
    method = A2C(kl_coef=0.0, lam=0.0, truncation="as_end")
    nothing = torch.zeros_like(VALUES)
    found = credit(method, looked(reference_logps=None, values=nothing), 0.0, None).advantages
    assert found.tolist() == [[0, 0, 1], [0, 0, 0], [2, 0, 0], [0, 0, 3]]
