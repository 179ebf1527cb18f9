"""Whole-policy optima of methods that sample: `align()` on tabular language models must come to the
closed form, within the noise of sampling. Runs are judged by where the policy ends, never by their
reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp

from alignkit import A2C, GRPO, PPO, REINFORCE, RLOO, GenerationOptions, TrainerOptions, align
from tests.ledger import Ledger
from tests.proofs.optima import tilted
from tests.proofs.states import answers_of, states_lm

B = 0.5
ARMS = np.array([0.2, 0.5, 0.3])
SCORES = np.array([1.0, 0.0, -1.0])
TREE = np.array([0.7 * 0.6, 0.7 * 0.4, 0.3 * 0.2, 0.3 * 0.8])
LEAVES = np.array([0.0, 1.0, 2.0, -1.0])

REWARDS: Mapping[str, Mapping[tuple[str, ...], float]] = {
    "arms": {("ash",): 1.0, ("birch",): 0.0, ("cedar",): -1.0},
    "tree": {
        ("left", "up"): 0.0,
        ("left", "down"): 1.0,
        ("right", "up"): 2.0,
        ("right", "down"): -1.0,
    },
}
MU = {"arms": ARMS, "tree": TREE}
OPTIMUM = {"arms": tilted(ARMS, SCORES / B), "tree": tilted(TREE, LEAVES / B)}
"""mu exp(r / beta): what an entropy of each token or a KL of each token alone would not give."""


def score(prompts: Sequence[str], responses: Sequence[str], rows: Any = None) -> list[float]:
    pairs = zip(prompts, responses, strict=True)
    return [REWARDS[prompt.strip()][tuple(answer.split())] for prompt, answer in pairs]


def world(*names: str) -> dict[str, dict[tuple[str, ...], float]]:
    return {n: dict(zip(REWARDS[n], MU[n].tolist(), strict=True)) for n in names}


def trained(
    method: Any, *names: str, steps: int, batch: int, rate: float, **more: Any
) -> tuple[dict[str, list[float]], Any]:
    """Prompt -> the policy's probabilities at the end; and the run's result."""
    probabilities = world(*names)
    model, tokenizer = states_lm(probabilities)
    trainer = TrainerOptions(
        max_steps=steps,
        batch_size=batch,
        learning_rate=rate,
        schedule=more.pop("schedule", "cosine"),
        warmup=0,
        precision="fp32",
        max_grad_norm=1e9,
        log_every=1,
    )
    result = align(
        (model, tokenizer),
        method,
        [{"prompt": f"{name} "} for name in names for _ in range(batch // len(names))],
        reward=score,
        generation=GenerationOptions(max_new_tokens=4),
        trainer=trainer,
        **more,
    )
    return answers_of(result.model, tokenizer, probabilities), result


def check(ledger: Ledger, name: str, claim: str, got: Any, expected: Any) -> None:
    ledger.check(name, claim, got=got, expected=expected, tolerance=0.02, measure="total variation")


PLAIN: dict[str, Any] = {"kl_coef": B, "truncation": "as_end"}
PPO_PLAIN: dict[str, Any] = {
    **PLAIN,
    "inner_epochs": 2,
    "whiten_advantages": False,
    "lam": 1.0,
    "vf_coef": 0.5,
    "value_clip_range": None,
}
CASES: dict[str, tuple[Any, int, int, float]] = {
    "ppo": (PPO(**PPO_PLAIN, rollout_size=2048), 160, 512, 0.1),
    "a2c": (A2C(**PLAIN, vf_coef=0.5), 100, 384, 0.15),
    "reinforce": (REINFORCE(**PLAIN), 100, 384, 0.15),
    "rloo": (RLOO(**PLAIN, samples_per_prompt=4), 100, 384, 0.15),
    "ppo, loss_k2": (PPO(**PPO_PLAIN, kl_mode="loss_k2", rollout_size=1024), 120, 512, 0.1),
}
"""Name -> method, optimizer steps, answers in each, learning rate. Advantages are not whitened, and
of values the whole return is learned, so that nothing but the objective decides where it ends."""


def test_the_world_is_what_it_says() -> None:
    probabilities = world("arms", "tree")
    model, tokenizer = states_lm(probabilities)
    for name, found in answers_of(model, tokenizer, probabilities).items():
        assert found == pytest.approx(MU[name].tolist(), abs=1e-6)
    assert OPTIMUM["arms"] == pytest.approx([0.732165, 0.247720, 0.020115], abs=1e-6)
    assert OPTIMUM["tree"][:2].sum() == pytest.approx(0.429326, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_kl_regularised_optimum(name: str, ledger: Ledger) -> None:
    method, steps, batch, rate = CASES[name]
    found, _ = trained(method, "arms", "tree", steps=steps, batch=batch, rate=rate)
    for prompt, got in found.items():
        claim = f"mu exp(r / beta), the optimum of E[r] - beta KL; {prompt}"
        check(ledger, name, claim, got, OPTIMUM[prompt])


@pytest.mark.slow
def test_a_group_s_own_mean_weakens_the_score(ledger: Ledger) -> None:
    """The mean that GRPO takes off holds the answer itself, so that an advantage is (K - 1) / K of
    what it is against the others, while the KL stands in the loss as it is."""
    samples = 8
    method = GRPO(
        kl_coef=B,
        scale_advantages=False,
        samples_per_prompt=samples,
        rollout_size=2048,
        inner_epochs=2,
    )
    found, _ = trained(method, "arms", "tree", steps=160, batch=512, rate=0.1)
    for prompt, scores in (("arms", SCORES), ("tree", LEAVES)):
        expected = tilted(MU[prompt], scores * (samples - 1) / samples / B)
        claim = f"mu exp((K - 1) / K r / beta), without the spread; {prompt}"
        check(ledger, "grpo", claim, found[prompt], expected)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "kl_coef"), [(0.1, 1.5592672), (0.3, 0.8676879)])
def test_a_constrained_kl_is_held(target: float, kl_coef: float, ledger: Ledger) -> None:
    """The dual variable comes to the coefficient whose optimum has this KL."""
    method = PPO(
        **{**PPO_PLAIN, "kl_coef": 1.0},
        kl_controller="constraint",
        kl_target=target,
        rollout_size=1024,
    )
    found, result = trained(method, "arms", steps=280, batch=512, rate=0.1)
    policy = np.array(found["arms"])
    ledger.check(
        "ppo, KL constraint",
        f"KL(policy, mu) = {target}",
        got=float((policy * np.log(policy / ARMS)).sum()),
        expected=target,
        tolerance=0.05,
        measure="relative",
    )
    held = [line["objective/kl_coef"] for line in result.history[-80:]]
    ledger.check(
        "ppo, KL constraint",
        f"kl_coef comes to the root of KL(optimum) = {target}",
        got=float(np.mean(held)),
        expected=kl_coef,
        tolerance=0.05,
        measure="relative",
    )


@pytest.mark.slow
def test_an_entropy_bonus(ledger: Ledger) -> None:
    """Whitening would rescale the policy's loss, and the bonus with it, so it is off."""
    method = A2C(**PLAIN, entropy_coef=0.5, vf_coef=0.5)
    found, _ = trained(method, "arms", steps=80, batch=768, rate=0.1)
    expected = tilted(np.ones(3), (SCORES + B * np.log(ARMS)) / (B + 0.5))
    assert expected == pytest.approx([0.572272, 0.332873, 0.094855], abs=1e-6)
    claim = "exp((r + beta ln mu) / (beta + c)), with an entropy bonus of c = 0.5"
    check(ledger, "a2c, entropy", claim, found["arms"], expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gamma", "golden"),
    [(1.0, [0.367570, 0.288606, 0.343823]), (10.0, [0.123518, 0.223836, 0.652646])],
)
def test_pretraining_rows_beside(gamma: float, golden: list[float], ledger: Ledger) -> None:
    """PPO-ptx: answers of the same length, so that means over tokens weigh both sides alike."""
    shares = np.array([0.1, 0.2, 0.7])

    def loss(logits: np.ndarray) -> float:
        logps = logits - logsumexp(logits)
        gain = np.exp(logps) @ (SCORES - B * (logps - np.log(ARMS)))
        return -float(gain + gamma * shares @ logps)

    searched = minimize(loss, np.zeros(3), options={"gtol": 1e-10}).x
    expected = np.exp(searched - logsumexp(searched))
    assert expected == pytest.approx(golden, abs=1e-5)
    rows = [
        {"prompt": "arms ", "completion": answer}
        for (answer,), share in zip(REWARDS["arms"], shares, strict=True)
        for _ in range(round(100 * share))
    ]
    method = PPO(**PPO_PLAIN, ptx_coef=gamma, ptx_data=rows, rollout_size=1000)
    found, _ = trained(method, "arms", steps=100, batch=500, rate=0.1)
    claim = f"max E[r] - beta KL + {gamma:g} E_D[ln policy]"
    check(ledger, "ppo-ptx", claim, found["arms"], expected)
