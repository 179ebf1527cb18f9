#!/usr/bin/env python
"""Does PPO on a reward model gain as much known reward as best-of-16 by the same reward model?

    python scripts/ppo_and_best_of_n.py [--work runs/ppo] [--quick]

The tiny chat LM that ships with the package. A reward model learns from 6,400 pairs that the known
reward labels; PPO trains on that reward model, and best-of-n picks by it; the known reward only
evaluates, on held-out prompts. It writes a figure of known reward against KL beside the best-of-n
frontier, and fails where PPO gains less than 90 % of what best-of-16 gains, or goes beyond 6 nats.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from alignkit import (
    PPO,
    GenerationOptions,
    RewardModel,
    TrainerOptions,
    align,
    paired_difference,
)
from alignkit.demo.chat_world import ChatPrompt, known_reward, make_pairs, prompt_rows
from alignkit.demo.text import MODEL
from alignkit.draws import generator
from alignkit.result import AlignResult
from alignkit.reward_names import reward_of

matplotlib.use("Agg")
GENERATION = GenerationOptions(max_new_tokens=80)
FAR = 6.0
SHARE = 0.9
ORDERS = (1, 2, 4, 8, 16)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/ppo"))
    parser.add_argument("--quick", action="store_true", help="few steps; no bar is applied")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--kl", type=float, default=0.02, help="kl_coef")
    options = parser.parse_args(given)
    prompts = prompt_rows(24 if options.quick else 300, seed=1, split="heldout")
    began = time.perf_counter()
    reward = reward_model(options.work, options.quick)
    trained = time.perf_counter()
    result = policy(options, reward)
    spent = time.perf_counter() - trained
    start = known(prompts, sampled(result.before, prompts, 1)[0])
    chosen = best_of(result.before, prompts, reward)
    after = known(prompts, sampled(result.after, prompts, 1)[0])
    kl = result.after.metrics["eval/objective/kl"]
    told = {
        "reward model, s": trained - began,
        "PPO, s": spent,
        "KL, nats": kl,
        "start": float(np.mean(start)),
        "PPO": paired_difference(after, start),
        **{f"best of {n}": paired_difference(scores, start) for n, scores in chosen.items()},
    }
    for name, value in told.items():
        print(f"{name:>18}  {value}")
    share = told["PPO"].value / told[f"best of {ORDERS[-1]}"].value
    print(f"{'share of best-of-16':>18}  {share:.2f}")
    draw(options.work / "frontier.png", told, chosen, start, after, kl)
    numbers = {name: getattr(value, "value", value) for name, value in told.items()}
    (options.work / "frontier.json").write_text(json.dumps(numbers | {"share": share}, indent=1))
    if options.quick:
        return 0
    return 0 if share >= SHARE and kl <= FAR and spent <= 600 else 1


def reward_model(work: Path, quick: bool) -> str:
    """The folder of the model that PPO and best-of-n go by."""
    steps = 5 if quick else 300
    align(
        str(MODEL),
        RewardModel(),
        make_pairs(64 if quick else 6400, seed=0),
        trainer=TrainerOptions(max_steps=steps, batch_size=32, learning_rate=3e-4),
        run_dir=work / "reward",
    )
    return str(work / "reward" / "model")


class Policies:
    """The policy before and after."""

    def __init__(self, before: Any, after: AlignResult) -> None:
        self.before, self.after = before, after


def policy(options: argparse.Namespace, reward: str) -> Policies:
    from alignkit.api import sample

    result = align(
        str(MODEL),
        PPO(kl_coef=options.kl, rollout_size=128, inner_epochs=2, critic_warmup=4),
        prompt_rows(64 if options.quick else 4000, seed=2),
        reward=reward,
        eval_data=prompt_rows(16 if options.quick else 200, seed=3, split="heldout"),
        generation=GENERATION,
        trainer=TrainerOptions(
            max_steps=4 if options.quick else options.steps,
            batch_size=64,
            learning_rate=options.rate,
            log_every=1,
        ),
        run_dir=options.work / "ppo",
        resume="never",
    )

    def before(prompts: Sequence[Any], generation: GenerationOptions, seed: int) -> list[str]:
        return sample(MODEL, prompts, generation, seed)

    return Policies(before, result)


def sampled(policy: Any, rows: Sequence[Any], num: int) -> list[list[str]]:
    """`num` answers to each prompt, by order of drawing."""
    asked = [row["prompt"] for row in rows]
    seeds = [int(generator("best", n).integers(2**31)) for n in range(num)]
    if isinstance(policy, AlignResult):
        return [policy.wing.sample(asked, GENERATION, seed=seed) for seed in seeds]
    return [policy(asked, GENERATION, seed) for seed in seeds]


def best_of(policy: Any, rows: Sequence[Any], reward: str) -> dict[int, list[float]]:
    """n -> the known reward of the best of n answers by the reward model."""
    ask = reward_of(reward, "text")
    asked = [row["prompt"] for row in rows]
    answers = sampled(policy, rows, ORDERS[-1])
    scores = np.array([ask(asked, texts, rows) for texts in answers], dtype=float)
    values = np.array([known(rows, texts) for texts in answers])
    places = range(len(rows))
    return {n: [float(values[scores[:n, i].argmax(), i]) for i in places] for n in ORDERS}


def known(rows: Sequence[Any], answers: Sequence[str]) -> list[float]:
    """The reward that nothing is trained on."""
    worlds = [ChatPrompt.from_json(row["world"]) for row in rows]
    return [known_reward(world, text) for world, text in zip(worlds, answers, strict=True)]


def draw(
    path: Path,
    told: dict[str, Any],
    chosen: dict[int, list[float]],
    start: list[float],
    after: list[float],
    kl: float,
) -> None:
    """Known reward against KL; best-of-n at its bound ln n - (n - 1) / n."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
    places = [np.log(n) - (n - 1) / n for n in ORDERS]
    axes.plot(places, [np.mean(chosen[n]) for n in ORDERS], "o-", label="best of n (KL bound)")
    axes.errorbar(
        [kl], [np.mean(after)], yerr=1.96 * np.std(after) / len(after) ** 0.5, fmt="s", label="PPO"
    )
    axes.plot([0], [np.mean(start)], "k.", label="start")
    axes.set(xlabel="KL to the start, nats per answer", ylabel="known reward, held-out prompts")
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
