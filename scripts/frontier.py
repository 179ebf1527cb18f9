#!/usr/bin/env python
"""What does a nat of KL buy? Expected known reward against KL, for offline and online methods.

    python scripts/frontier.py [--out runs/frontier] [--quick] [--only dpo ppo ...]

The frontier of the DPO paper (Rafailov et al. 2023, 2305.18290, figure 2) in miniature: the
shipped chat model, the chat world's preference pairs, and the reward that is known exactly. Every
point is a policy trained by `align()` at one strength of the KL; its reward and its KL to the start
are means over its own answers to held-out prompts at temperature 1, with 95 % intervals over
prompts. SFT on chosen answers has no such strength, so its points are lengths of training;
best-of-n has its n, and the KL ln n - (n - 1) / n, which is an upper bound.

Each point is kept in OUT/points.jsonl, and a second call goes on where the first one was. The
figure is OUT/frontier.png.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from alignkit import DPO, KTO, PPO, SFT, GenerationOptions, TextOptions, TrainerOptions, align
from alignkit.demo.chat_world import ChatPrompt, known_reward, make_pairs, make_prompts, prompt_rows
from alignkit.demo.text import MODEL
from alignkit.records import RecordFile
from alignkit.statistics import mean
from alignkit.text import build

matplotlib.use("Agg")

OWN = GenerationOptions(max_new_tokens=64, temperature=1.0)
BEST_OF = (1, 2, 4, 8, 16)
POOL = 32
"""Answers to each prompt from which the reward of best-of-n is estimated."""


@dataclass(frozen=True)
class Size:
    """How much is done."""

    pairs: int = 1600
    steps: int = 50
    prompts: int = 256
    online_steps: int = 80


QUICK = Size(pairs=64, steps=1, prompts=8, online_steps=2)


@dataclass(frozen=True)
class Point:
    """One policy to train.

    Attributes:
        method: the curve it is on.
        strength: what is varied along the curve.
        train: gives the run's arguments.
    """

    method: str
    strength: float
    arguments: Callable[[Size], dict[str, Any]]


def score(prompts: Sequence[Any], responses: Sequence[str], rows: Any) -> list[float]:
    """The known reward, as `align` calls one."""
    pairs = zip(rows, responses, strict=True)
    return [known_reward(ChatPrompt.from_json(row["world"]), answer) for row, answer in pairs]


@cache
def pairs(num: int) -> list[dict[str, Any]]:
    return make_pairs(num, seed=0)


def chosen(num: int) -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(num)]


def singles(num: int) -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs(num)
        for side in ("chosen", "rejected")
    ]


def offline(method: Any, rows: Callable[[int], Any], steps: int | None = None) -> Any:
    """The arguments of a run on data."""

    def arguments(size: Size) -> dict[str, Any]:
        return {
            "method": method,
            "data": rows(size.pairs),
            "trainer": TrainerOptions(
                max_steps=min(steps or size.steps, size.steps),
                batch_size=32,
                learning_rate=6e-4,
                log_every=10,
            ),
        }

    return arguments


def online(method: Any) -> Any:
    """The arguments of a run on the policy's own answers, scored by the known reward."""

    def arguments(size: Size) -> dict[str, Any]:
        return {
            "method": method,
            "data": prompt_rows(1024, seed=0),
            "reward": score,
            "generation": OWN,
            "trainer": TrainerOptions(
                max_steps=size.online_steps, batch_size=32, learning_rate=2e-4, log_every=10
            ),
        }

    return arguments


def points() -> Iterator[Point]:
    """All points, the curves that say most first."""
    for beta in (0.02, 0.1, 0.5, 2.0):
        yield Point("DPO", beta, offline(DPO(beta=beta), pairs))
    for coefficient in (0.02, 0.05, 0.1, 0.3):
        method = PPO(kl_coef=coefficient, rollout_size=128, inner_epochs=2, truncation="as_end")
        yield Point("PPO on the known reward", coefficient, online(method))
    for beta in (0.02, 0.1, 0.5, 2.0):
        yield Point("IPO", beta, offline(DPO("ipo", beta=beta, average=False), pairs))
    for beta in (0.02, 0.1, 0.5, 2.0):
        yield Point("KTO", beta, offline(KTO(beta=beta), singles))
    for beta in (0.5, 1.0, 2.0, 4.0):
        yield Point("SimPO", beta, offline(DPO("simpo", beta=beta), pairs))
    for steps in (5, 15, 50):
        yield Point("SFT on chosen", steps, offline(SFT(), chosen, steps))


class World:
    """Held-out prompts, and the policy that all runs start from."""

    def __init__(self, num: int) -> None:
        self.prompts = make_prompts(num, seed=1, split="heldout")
        self.asked = [prompt.messages for prompt in self.prompts]
        self.start = build(str(MODEL))

    def reward(self, answers: Sequence[str]) -> list[float]:
        return [known_reward(p, a) for p, a in zip(self.prompts, answers, strict=True)]

    def measured(self, wing: Any) -> dict[str, float]:
        """Mean reward and mean log-ratio of a policy's own answers, with intervals."""
        found = wing.sample_counted(self.asked, OWN, seed=1)
        rows = [
            {"prompt_ids": prompt, "completion_ids": answer}
            for prompt, answer in zip(found.prompt_ids, found.answer_ids, strict=True)
        ]
        ratios = likelihoods(wing, rows) - likelihoods(self.start, rows)
        return told("reward", self.reward(found.answers)) | told("kl", ratios.tolist())

    def best_of(self) -> Iterator[dict[str, Any]]:
        """Best-of-n of the start, n by n, from one pool of answers to each prompt."""
        drawn = self.start.sample(self.asked * POOL, OWN, seed=2)
        num = len(self.asked)
        scores = np.array([self.reward(drawn[k * num : (k + 1) * num]) for k in range(POOL)])
        ordered = np.sort(scores, axis=0)  # (POOL, prompts)
        for n in BEST_OF:
            # The chance that the i-th smallest of the pool is the best of n drawn from it.
            below = [math.comb(i, n) / math.comb(POOL, n) for i in range(POOL + 1)]
            best = np.diff(below) @ ordered
            kl = math.log(n) - (n - 1) / n
            yield {"method": "best-of-n", "strength": n, **told("reward", best.tolist()), "kl": kl}


def told(name: str, values: Sequence[float]) -> dict[str, float]:
    found = mean(values)
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


@torch.no_grad()
def likelihoods(wing: Any, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The summed log-likelihood of each answer, in tokens as it was sampled."""
    examples = wing.examples(list(rows), TextOptions(), kind="supervised", seed=0)
    found = np.zeros(len(rows))
    for start in range(0, len(rows), 64):
        places = list(range(start, min(start + 64, len(rows))))
        for piece in wing.backend.split(examples.collate(places, [0] * len(places)), "auto"):
            found[piece.row_id.numpy()] = wing.backend.module(piece).total.double().numpy()
    return found


def run(out: Path, size: Size, only: Sequence[str]) -> list[dict[str, Any]]:
    """All points that are not there yet."""
    out.mkdir(parents=True, exist_ok=True)
    file = RecordFile(out / "points.jsonl")
    done = {(point["method"], point["strength"]) for point in file.read()}
    wanted = [name.lower() for name in only]

    def asked(method: str) -> bool:
        return not wanted or any(name in method.lower() for name in wanted)

    world = World(size.prompts)
    if asked("best-of-n") and ("best-of-n", BEST_OF[-1]) not in done:
        for found in world.best_of():
            file.append(found)
    for point in points():
        if (point.method, point.strength) in done or not asked(point.method):
            continue
        began = time.perf_counter()
        arguments = point.arguments(size)
        method = arguments.pop("method")
        result = align(str(MODEL), method, arguments.pop("data"), **arguments)
        seconds = time.perf_counter() - began
        found = {"method": point.method, "strength": point.strength, "seconds": round(seconds, 1)}
        file.append(found | world.measured(result.wing))
        print(json.dumps(file.read()[-1]), flush=True)
    return file.read()


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Reward against KL, a curve per method, intervals of both."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for method in dict.fromkeys(point["method"] for point in found):
        curve = sorted((p for p in found if p["method"] == method), key=lambda p: p["kl"])
        x, y = ([point[name] for point in curve] for name in ("kl", "reward"))
        errors = {
            axis: np.abs(
                [[p[name] - p.get(f"{name}_{end}", p[name]) for p in curve] for end in ends]
            )
            for axis, name, ends in (
                ("xerr", "kl", ("low", "high")),
                ("yerr", "reward", ("low", "high")),
            )
        }
        axes.errorbar(x, y, **errors, marker="o", markersize=3.5, capsize=2, lw=1, label=method)
    axes.set(xlabel="KL to the start, nats per answer", ylabel="expected known reward")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--quick", action="store_true", help="shows that everything runs")
    parser.add_argument("--only", nargs="*", default=(), help="parts of the curves' names")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = run(options.out, QUICK if options.quick else Size(), options.only)
    draw(found, options.out / "frontier.png")
    for point in found:
        reward = "{reward:.3f} [{reward_low:.3f}, {reward_high:.3f}]".format(**point)
        print(f"{point['method']:25} {point['strength']:<6g} KL {point['kl']:6.2f}  {reward}")
    print(f"Figure: {options.out / 'frontier.png'}")


if __name__ == "__main__":
    main()
