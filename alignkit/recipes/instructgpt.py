"""InstructGPT: demonstrations, a reward model of ordered answers, PPO with pretraining rows beside.

Ouyang et al. 2022 (2203.02155). PPO runs twice, without and with the pretraining rows, so that the
report shows what they are for: the alignment tax.
"""

from __future__ import annotations

from typing import Any

from alignkit.facts import EvaluationRow
from alignkit.labeller import sample_preferences
from alignkit.recipes.journey import Journey, Policy, Recipe
from alignkit.recipes.settings import generation, trainer
from alignkit.reward_names import reward_of
from alignkit.statistics import paired_difference

K = 4
"""Answers to each prompt that are ordered; 4 to 9 in the paper."""


def travel(journey: Journey) -> None:
    """SFT, reward model, PPO, PPO-ptx."""
    world = journey.world
    sft = {
        "policy": journey.policy,
        "method": {"name": "sft"},
        "data": world and world.demonstrations(),
        "trainer": trainer(journey, 40, batch_size=32, rate=2e-4 if world else 1e-5),
        "generation": generation(journey),
    }
    journey.stage("sft", sft)
    pairs = _reward_model(journey)
    folder = journey.model("reward_model")
    judge: Any = world.reward if world else reward_of(folder, "text")
    by = world.measured_by if world else "the reward model"
    start = journey.look(journey.policy, judge)
    tuned = journey.look(journey.model("sft"), judge)
    journey.arrived("sft", start, tuned, by)
    if pairs is not None:
        journey.judge("reward_model", folder, pairs)
    plain = _ppo(journey, "ppo", {}, judge)
    journey.arrived("ppo", tuned, plain, by)
    beside = {
        "ptx_coef": 1.0,
        "ptx_data": world.pretraining() if world else None,
    }
    mixed = _ppo(journey, "ppo_ptx", beside, judge)
    journey.arrived("ppo_ptx", tuned, mixed, by, _spared(plain, mixed))


def _reward_model(journey: Journey) -> Any:
    """Train it; gives back held-out pairs, if there are any."""
    world, heldout = journey.world, None
    settings: dict[str, Any] = {
        "policy": journey.model("sft"),
        "method": {"name": "reward_model", "centering": 0.01},
        "trainer": trainer(journey, 120, batch_size=16, rate=2e-4 if world else 9e-6),
    }
    if world:
        for split in ("train", "heldout"):
            answered = sample_preferences(
                journey.model("sft"),
                world.to_rank(split),
                out=journey.plan.folder("data", f"answers-{split}"),
                reward=world.reward,
                samples_per_prompt=K,
                generation=journey.generation,
                seed=journey.plan.seed,
            )
            ranked = world.ranked(split, answered / "metadata.jsonl")
            settings["data" if split == "train" else "eval_data"] = ranked
        heldout = settings["eval_data"]
    journey.stage("reward_model", settings)
    return journey.settings("reward_model", settings).get("eval_data", heldout)


def _ppo(journey: Journey, name: str, more: dict[str, Any], judge: Any) -> Policy:
    folder, world = journey.model("reward_model"), journey.world
    settings = {
        "policy": journey.model("sft"),
        # Table 6 and appendix C.4: clip 0.2, one epoch, batch 512 in minibatches of 64.
        "method": {
            "name": "ppo",
            "kl_coef": 0.02,
            "inner_epochs": 1 if not world else 2,
            "rollout_size": journey.by_size(128, 16) if world else 512,
            "critic": "reward_model",
            **more,
        },
        "data": world and world.prompts(),
        "reward": folder,
        "trainer": trainer(journey, 80, batch_size=64, rate=2e-4 if world else 5e-6),
        "generation": generation(journey),
    }
    journey.stage(name, settings)
    return journey.look(journey.model(name), judge)


def _spared(plain: Policy, mixed: Policy) -> list[EvaluationRow]:
    """What the pretraining rows spare, against PPO without them."""
    name = "loss per token"
    if name not in plain.tax:
        return []
    found = paired_difference(plain.tax[name].tolist(), mixed.tax[name].tolist())
    row = EvaluationRow.of(
        "loss per token of the tasks, with pretraining rows less without",
        found,
        unit="nats",
        better="lower",
    )
    return [row]


RECIPE = Recipe(
    name="instructgpt",
    title="InstructGPT: SFT, reward model, PPO and PPO-ptx",
    stages=("sft", "reward_model", "ppo", "ppo_ptx"),
    travel=travel,
)
