"""In the manner of Sparrow: a preference model, a model of rules, A2C on both.

Glaese et al. 2022 (2209.14375). The rule model reads the rule after the prompt and says whether the
answer keeps it; the score is the preference's and the log-chances that the rules are kept. The
paper's search for evidence and its self-play are not part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignkit.errors import ConfigError
from alignkit.recipes.journey import Journey, Recipe
from alignkit.recipes.settings import generation, trainer
from alignkit.recipes.world import RULES
from alignkit.reward_names import reward_of


def travel(journey: Journey) -> None:
    """Preference model, rule model, A2C."""
    world = journey.world
    judged = {name: _reward_model(journey, name) for name in ("preference", "rules")}
    score = {
        "kind": "rules",
        "rule_model": journey.model("rules"),
        "preference": journey.model("preference"),
        "rules": dict(_rules(journey)),
    }
    judge: Any = world.reward if world else reward_of(score, "text")
    by = world.measured_by if world else "preference and rules"
    start = journey.look(journey.policy, judge)
    for name, pairs in judged.items():
        if pairs is not None:
            journey.judge(name, journey.model(name), pairs)
    a2c = {
        "policy": journey.policy,
        "method": {"name": "a2c", "kl_coef": 0.05},
        "data": world and world.prompts(),
        "reward": score,
        "trainer": trainer(journey, 120, batch_size=64, rate=2e-4 if world else 1e-6),
        "generation": generation(journey),
    }
    journey.stage("a2c", a2c)
    journey.arrived("a2c", start, journey.look(journey.model("a2c"), judge), by)


def _rules(journey: Journey) -> Mapping[str, str]:
    """Name -> text; the plan's own, under `rules`."""
    if journey.plan.rules:
        return journey.plan.rules
    if journey.world:
        return RULES
    raise ConfigError(
        "rules must be given: name: text of each rule, as the rows of stages.rules name them."
    )


def _reward_model(journey: Journey, name: str) -> Any:
    """Train one of the two; gives back held-out pairs, if there are any."""
    world = journey.world
    data = {}
    if world:
        make = world.rule_pairs if name == "rules" else world.preference_pairs
        data = {"data": make("train"), "eval_data": make("heldout")}
    settings: dict[str, Any] = {
        "policy": journey.policy,
        "method": {"name": "reward_model"},
        "trainer": trainer(journey, 80, batch_size=32, rate=2e-4 if world else 1e-5),
        **data,
    }
    journey.stage(name, settings)
    return journey.settings(name, settings).get("eval_data")


RECIPE = Recipe(
    name="sparrow",
    title="Sparrow: preference and rule reward models, A2C",
    stages=("preference", "rules", "a2c"),
    travel=travel,
)
