"""What a recipe's file may say, and that its configurations are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from alignkit import ConfigError
from alignkit.recipes import RECIPES, plan_of

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "recipes").glob("*.yaml"))
CHAT: dict[str, Any] = {"recipe": "instructgpt", "world": "chat", "run_dir": "runs/x"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_is_read_and_says_what_it_is(path: Path) -> None:
    plan = plan_of(yaml.safe_load(path.read_text()), str(path))
    assert plan.recipe in RECIPES and path.name.startswith(plan.recipe)
    for word in ("Shows:", "Needs:", "Takes:", f"alignkit train configs/recipes/{path.name}"):
        assert word in path.read_text()
    assert len(path.read_text().splitlines()) <= 60


def test_every_recipe_has_a_tiny_and_a_real_configuration() -> None:
    assert {path.stem for path in CONFIGS} == {
        name for recipe in RECIPES for name in (recipe, f"{recipe}_tiny")
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "instruct_gpt"}, "Unknown recipe 'instruct_gpt'. Did you mean 'instructgpt'"),
        ({"stages": {"pppo": {}}}, "Unknown stage 'pppo'. Did you mean 'ppo'"),
        ({"run_dir": None}, "run_dir must be given"),
        ({"world": "chess"}, "Unknown world 'chess'"),
        ({"world": None}, "policy must be given"),
        ({"world": None, "policy": "x"}, "prompts must be given"),
        ({"steps": 3}, "steps is not an option"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        plan_of({**CHAT, **changes})
