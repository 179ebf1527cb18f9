"""Published pipelines, each a composition of `align()` calls, with one report that follows the
model through its stages.

    recipe: instructgpt
    world: chat                    # the tiny chat world; or name the stages' own data
    run_dir: runs/instructgpt
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkit.errors import refuse_unknown
from alignkit.recipes import instructgpt, llama2_chat, sparrow
from alignkit.recipes.journey import Journey, Recipe
from alignkit.recipes.plan import Plan, read_plan

RECIPES: Mapping[str, Recipe] = {
    one.name: one for one in (instructgpt.RECIPE, llama2_chat.RECIPE, sparrow.RECIPE)
}
"""Name in YAML -> recipe."""

__all__ = ["RECIPES", "Plan", "Recipe", "plan_of", "run_recipe"]


def plan_of(mapping: Mapping[str, Any], where: str = "recipe") -> Plan:
    """The plan that a YAML file with `recipe:` describes.

    Raises:
        ConfigError: an unknown recipe, stage or key, or something that is missing.
    """
    refuse_unknown("recipe", str(mapping.get("recipe")), RECIPES)
    recipe = RECIPES[str(mapping["recipe"])]
    return read_plan(mapping, recipe.stages, where)


def run_recipe(plan: Plan) -> Path:
    """Run all stages; a finished one is not redone. Returns the path of the report."""
    recipe = RECIPES[plan.recipe]
    journey = Journey(plan, recipe)
    recipe.travel(journey)
    return journey.report()
