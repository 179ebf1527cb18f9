"""Every recipe runs through its stages on the tiny chat model, says what came of each, and is not
redone when it is called again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignkit.recipes import RECIPES, plan_of, run_recipe
from alignkit.run_folder import RunFolder

POLICIES = ("sft", "ppo", "ppo_ptx", "rejection_sampling", "a2c")


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_follows_the_model_through_its_stages(name: str, tmp_path: Path) -> None:
    told: dict[str, Any] = {"recipe": name, "world": "chat", "quick": True}
    plan = plan_of({**told, "run_dir": str(tmp_path / "run")})
    report = run_recipe(plan)
    page = report.read_text(encoding="utf-8")
    before: dict[Path, float] = {}
    for number, stage in enumerate(RECIPES[name].stages, start=1):
        place = plan.folder(f"{number}-{stage}")
        facts = (RunFolder(place).read_result() or {})["facts"]
        measures = [row["measure"] for row in facts["evaluation"]]
        assert measures and facts["title"] in page and f"{place.name}/report.html" in page
        if stage in POLICIES:
            assert measures[0] == "held-out prompts, by the known reward"
            assert "alignment tax: loss per token" in measures
        else:
            assert measures == ["held-out pairs it orders rightly"]
        before |= {file: file.stat().st_mtime for file in (place / "model").iterdir()}
    run_recipe(plan)
    assert {file: file.stat().st_mtime for file in before} == before, "nothing is trained again"
