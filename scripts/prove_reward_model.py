#!/usr/bin/env python
"""Does a reward model learn what labels teach? On the tiny chat model, with labels of known noise.

    python scripts/prove_reward_model.py [--pairs 6000] [--held-out 2400] [--work FOLDER]

Two answers to a prompt; the first is labelled better with probability s(k (g_a - g_b)), g the known
reward. The Bayes accuracy is the mean of max(p, 1 - p) over the held-out pairs. Bars: accuracy
within 2 points of it, ECE of at most 0.05 in 15 bins; regression on g: R^2 of at least 0.9.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

SHARPNESS = 6.0
BINS = 15


def answers(num: int, seed: int, split: Any) -> list[dict[str, Any]]:
    """Prompts with two answers of different known reward, and these."""
    from alignkit.demo.chat_world import draw_style, known_reward, make_answer, make_prompts

    rng = random.Random(f"reward-{split}-{seed}")
    found = []
    for prompt in make_prompts(num, seed, split):
        texts = [make_answer(prompt, draw_style(rng, prompt), rng) for _ in range(2)]
        worth = [known_reward(prompt, text) for text in texts]
        found.append({"prompt": prompt.messages, "answers": texts, "worth": worth})
    return found


def turn(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def labelled(rows: list[dict[str, Any]], seed: int) -> tuple[list[dict[str, Any]], float]:
    """Pairs with noisy labels, and the Bayes accuracy."""
    rng = random.Random(seed)
    pairs, best = [], 0.0
    for row in rows:
        p = 1 / (1 + math.exp(-SHARPNESS * (row["worth"][0] - row["worth"][1])))
        best += max(p, 1 - p)
        first, second = row["answers"] if rng.random() < p else row["answers"][::-1]
        pairs.append({"prompt": row["prompt"], "chosen": turn(first), "rejected": turn(second)})
    return pairs, best / len(rows)


def rated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completion": turn(text), "score": worth}
        for row in rows
        for text, worth in zip(row["answers"], row["worth"], strict=True)
    ]


def calibration_error(margins: list[float]) -> float:
    """Mean over bins of |accuracy - confidence|, by their pairs; confidence max(p, 1 - p)."""
    bins: list[list[tuple[float, float]]] = [[] for _ in range(BINS)]
    for margin in margins:
        confidence = 1 / (1 + math.exp(-abs(margin)))
        place = min(BINS - 1, int((confidence - 0.5) * 2 * BINS))
        bins[place].append((confidence, 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0))
    gaps = [abs(sum(c - hit for c, hit in one)) for one in bins if one]
    return sum(gaps) / len(margins)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=6000)
    parser.add_argument("--held-out", type=int, default=2400)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--work", type=Path, default=Path("runs") / "reward-proof")
    options = parser.parse_args()
    from alignkit import RewardModel, TrainerOptions, align
    from alignkit.demo.text import MODEL
    from alignkit.statistics import wilson
    from alignkit.text import load_reward

    held = answers(options.held_out, 1, "heldout")
    train = answers(options.pairs, 0, "train")
    trainer = TrainerOptions(epochs=2, batch_size=64, learning_rate=options.rate, schedule="cosine")
    pairs, _ = labelled(train, 0)
    tests, bayes = labelled(held, 1)
    align(str(MODEL), RewardModel(), pairs, trainer=trainer, run_dir=options.work / "pairs")
    reward = load_reward(options.work / "pairs")
    prompts = [row["prompt"] for row in tests]
    chosen = reward(prompts, [row["chosen"] for row in tests])
    rejected = reward(prompts, [row["rejected"] for row in tests])
    margins = [one - other for one, other in zip(chosen, rejected, strict=True)]
    hits = sum((m > 0) + 0.5 * (m == 0) for m in margins)
    low, high = wilson(hits, len(margins))
    ratings = rated(held)
    align(
        str(MODEL),
        RewardModel(kind="regression"),
        rated(train),
        eval_data=ratings,
        trainer=trainer,
        run_dir=options.work / "ratings",
    )
    scores = load_reward(options.work / "ratings")(
        [row["prompt"] for row in ratings], [row["completion"] for row in ratings]
    )
    mean = sum(row["score"] for row in ratings) / len(ratings)
    spread = sum((row["score"] - mean) ** 2 for row in ratings)
    off = sum((s - row["score"]) ** 2 for s, row in zip(scores, ratings, strict=True))
    told = {
        "held-out pairs": len(margins),
        "accuracy": hits / len(margins),
        "interval": [low, high],
        "Bayes accuracy": bayes,
        "ECE": calibration_error(margins),
        "R2": 1 - off / spread,
    }
    print(json.dumps(told, indent=1))
    met = told["accuracy"] >= bayes - 0.02 and told["ECE"] <= 0.05 and told["R2"] >= 0.9
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
