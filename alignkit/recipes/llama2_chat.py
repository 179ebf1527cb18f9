"""Llama 2 Chat: demonstrations, two reward models with margins, rejection sampling in rounds, PPO.

Touvron et al. 2023 (2307.09288), section 3. Safety decides over prompts that are tagged and answers
that seem unsafe, helpfulness over the rest; PPO's score is that, as log-odds and whitened.
"""

from __future__ import annotations

from typing import Any

from alignkit.recipes.journey import Journey, Recipe
from alignkit.recipes.settings import generation, trainer
from alignkit.reward_names import reward_of

MARGINS = {"significantly": 1.0, "better": 2 / 3, "slightly": 1 / 3, "negligibly": 0.0}
"""How much better the chosen answer is -> the margin (table 27, the small ones)."""


def travel(journey: Journey) -> None:
    """SFT, both reward models, rejection sampling, PPO."""
    world = journey.world
    sft = {
        "policy": journey.policy,
        "method": {"name": "sft"},
        "data": world and world.demonstrations(),
        "trainer": trainer(journey, 40, batch_size=32, rate=2e-4 if world else 2e-5),
        "generation": generation(journey),
    }
    journey.stage("sft", sft)
    judged = {name: _reward_model(journey, name) for name in ("helpfulness", "safety")}
    both = {"kind": "safety_helpfulness"} | {name: journey.model(name) for name in judged}
    # Scores of several calls are compared, so they are not whitened.
    plain = both | {"whitened": False}
    judge: Any = world.reward if world else reward_of(plain, "text")
    by = world.measured_by if world else "safety and helpfulness"
    start = journey.look(journey.policy, judge)
    tuned = journey.look(journey.model("sft"), judge)
    journey.arrived("sft", start, tuned, by)
    for name, pairs in judged.items():
        if pairs is not None:
            journey.judge(name, journey.model(name), pairs)
    sampling = {
        "policy": journey.model("sft"),
        "method": {
            "name": "rejection_sampling",
            "samples_per_prompt": journey.by_size(8, 2),
            "rounds": 2,
            "temperatures": [1.0, 1.2],
            "start": "first",
        },
        "data": world and world.tagged_prompts(),
        "reward": plain,
        "trainer": trainer(journey, 40, batch_size=32, rate=1e-4 if world else 2e-5),
        "generation": generation(journey),
    }
    journey.stage("rejection_sampling", sampling)
    picked = journey.look(journey.model("rejection_sampling"), judge)
    journey.arrived("rejection_sampling", tuned, picked, by)
    ppo = {
        "policy": journey.model("rejection_sampling"),
        "method": {
            "name": "ppo",
            "kl_coef": 0.05 if world else 0.01,
            "inner_epochs": 1,
            "rollout_size": journey.by_size(128, 16) if world else 512,
        },
        "data": world and world.tagged_prompts(),
        "reward": both,
        "trainer": trainer(journey, 60, batch_size=64, rate=2e-4 if world else 1e-6),
        "generation": generation(journey),
    }
    journey.stage("ppo", ppo)
    journey.arrived("ppo", picked, journey.look(journey.model("ppo"), judge), by)


def _reward_model(journey: Journey, name: str) -> Any:
    """Train it from pairs with margins; gives back held-out pairs, if there are any."""
    world = journey.world
    settings: dict[str, Any] = {
        "policy": journey.model("sft"),
        "method": {"name": "reward_model"},
        "data": world and world.rated_pairs(name, MARGINS),
        "eval_data": world and world.rated_pairs(name, MARGINS, "heldout"),
        "trainer": trainer(journey, 60, batch_size=32, rate=2e-4 if world else 1e-5),
    }
    journey.stage(name, settings)
    return journey.settings(name, settings).get("eval_data")


RECIPE = Recipe(
    name="llama2_chat",
    title="Llama 2 Chat: SFT, two reward models, rejection sampling, PPO",
    stages=("sft", "helpfulness", "safety", "rejection_sampling", "ppo"),
    travel=travel,
)
