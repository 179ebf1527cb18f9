"""Recurring defects of online systems, each with a test of its name; others stand beside what they
are about (`test_credit`, `test_rollouts`, the faults and the laws of losses).
"""

from __future__ import annotations

import pytest
import torch

from alignkit import PPO, ConfigError, GenerationOptions
from alignkit.batches import Batch
from alignkit.health import health
from alignkit.losses.policy_gradient import entropy
from alignkit.text.head import TokenEntropy
from alignkit.text.wing import build
from tests.builders import tiny_tokenizer
from tests.distributed.cases import _continued
from tests.online.test_rollouts import PROMPTS, first_batch, online


def phase(batch: Batch) -> dict[str, float]:
    assert batch.experience is not None
    return dict(batch.experience.phase)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_defect_01_what_sampled_is_what_learns(temperature: float) -> None:
    """Per token and not in the mean, at the temperature of sampling."""
    generation = GenerationOptions(max_new_tokens=6, temperature=temperature)
    found = phase(first_batch(online(PPO(truncation="as_end"), generation=generation)))
    assert found["mismatch/max"] < 1e-5
    assert abs(found["mismatch/kl"]) < 1e-6


def test_defect_04_estimates_of_the_kl_in_the_wrong_place_are_refused() -> None:
    for mode in ("loss_k1", "reward_k2", "reward_k3"):
        with pytest.raises(ConfigError, match="is refused"):
            PPO(kl_mode=mode)  # type: ignore[arg-type]


def test_defect_08_rollouts_that_teach_nothing_are_told() -> None:
    lines = [{"step": step, "objective/scores": 0.0} for step in range(1, 9)]
    assert health(lines) == []
    cut = health([{**line, "answers/ended": 0.0} for line in lines])
    assert len(cut) == 1 and "100 % of the answers were cut" in cut[0]
    same = health([{**line, "health/equal_groups": 1.0} for line in lines])
    assert len(same) == 1 and "score the same" in same[0]


@pytest.mark.parametrize(
    ("curves", "word"),
    [
        ({"objective/kl": (1, 80)}, "far from the reference"),
        ({"policy/entropy": (2, 0.1)}, "entropy collapsed"),
        ({"answers/length": (10, 40)}, "Answers grew"),
        ({"objective/scores": (0, 2), "eval/objective/scores/gold": (1, 0)}, "gets wrong"),
        ({"critic/clipfrac": (0.5, 0.6)}, "value clip"),
    ],
)
def test_alarms_of_a_report(curves: dict[str, tuple[float, float]], word: str) -> None:
    """One alarm for what goes wrong, and none for the same curve backwards."""
    steps = range(8)

    def lines(ends: dict[str, tuple[float, float]]) -> list[dict[str, float]]:
        given = {"objective/scores": (0.0, 0.0), **ends}
        return [
            {"step": t + 1} | {n: a + (b - a) * t / 7 for n, (a, b) in given.items()} for t in steps
        ]

    (found,) = health(lines(curves))
    assert word in found
    if "critic/clipfrac" not in curves:
        assert not health(lines({name: (b, a) for name, (a, b) in curves.items()}))


def test_defect_11_the_entropy_s_gradient_is_that_of_the_dense_one() -> None:
    """With a token that cannot come; checked in float64 against autograd of the plain formula."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(7, 11)
    logits[2, 4] = -1e4
    given, dense = logits.clone().requires_grad_(), logits.double().requires_grad_()
    weight = torch.randn(7)
    found, expected = TokenEntropy.apply(given), entropy(dense)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    (mine,) = torch.autograd.grad((found * weight).sum(), given)
    (theirs,) = torch.autograd.grad((expected * weight.double()).sum(), dense)
    assert torch.allclose(mine.double(), theirs, atol=1e-5)


def test_defect_14_the_reference_of_a_continued_adapter_is_its_start() -> None:
    """Not the base below it: the KL is 0 at the start."""
    from alignkit.api import build as build_run
    from tests.faults.runs import short_and_odd

    run = build_run(
        _continued(),
        PPO(truncation="as_end", critic="shared"),
        PROMPTS,
        reward=short_and_odd,
        generation=GenerationOptions(max_new_tokens=4),
    )
    batch = first_batch(run)  # type: ignore[arg-type]
    assert batch.experience is not None
    assert batch.experience.answers["objective/kl"].eq(0).all()


def test_defect_15_answers_are_learned_in_the_tokens_that_were_sampled() -> None:
    """No text in between: the ids of the batch are those that the wing drew."""
    run = online(PPO(truncation="as_end"))
    written = []
    generate = run.wing.generate_tokens  # type: ignore[attr-defined]

    def noting(*given: object, **named: object) -> object:
        written.extend(found := generate(*given, **named))
        return found

    run.wing.generate_tokens = noting  # type: ignore[attr-defined]
    batch = first_batch(run)
    learned = sorted(ids.tolist() for ids in batch.content.completions)
    assert learned == sorted(one.ids for one in written)


def test_a_critic_on_the_trunk_needs_a_wing_that_shows_its_states() -> None:
    from tests.builders import tiny_lm

    wing = build((tiny_lm("llama"), tiny_tokenizer()))
    wing.module.head.splits = False  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="critic='separate'"):
        wing.value_head()
