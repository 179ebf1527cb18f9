"""A model's way through the stages of a recipe, and the report that follows it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from alignkit.api import align
from alignkit.asking import read_prompts
from alignkit.config import RunConfig, from_mapping
from alignkit.errors import ConfigError
from alignkit.facts import EvaluationRow, ReportFacts
from alignkit.methods import SFT
from alignkit.options import GenerationOptions
from alignkit.parts import build_wing
from alignkit.preferences import by_reward
from alignkit.protocols import Reward
from alignkit.recipes.plan import Plan
from alignkit.recipes.tax import Tasks, Tax, compared, measure
from alignkit.recipes.world import ChatWorld
from alignkit.report import write_index, write_report
from alignkit.result import AlignResult
from alignkit.reward_names import reward_of
from alignkit.rows import read_rows
from alignkit.run_folder import RunFolder
from alignkit.runtime import Runtime
from alignkit.statistics import paired_difference, preference_rate, preferences

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A published pipeline.

    Attributes:
        name: in YAML.
        title: of the report.
        stages: their names, in order.
        travel: runs them.
    """

    name: str
    title: str
    stages: tuple[str, ...]
    travel: Callable[[Journey], None]


@dataclass
class Policy:
    """A policy on its way.

    Attributes:
        folder: of its model.
        scores: of its answers to the held-out prompts, by the judge of the recipe.
        tax: what it makes of the tasks.
    """

    folder: str
    scores: list[float | None]
    tax: Tax


class Journey:
    """The stages of one run of a recipe.

    Args:
        plan: what was asked for.
        recipe: the pipeline.
    """

    def __init__(self, plan: Plan, recipe: Recipe) -> None:
        self.plan, self.recipe = plan, recipe
        plan.folder().mkdir(parents=True, exist_ok=True)
        self.world = None if plan.world is None else ChatWorld(plan.folder("data"), plan.quick)
        self.policy = plan.policy or ChatWorld.model
        prompts = plan.prompts or (self.world.heldout() if self.world else None)
        self.prompts = read_prompts(prompts, {})
        tasks: Any = plan.tasks or (self.world.tasks() if self.world else {})
        self.tasks = Tasks.read(tasks)
        self.generation = GenerationOptions(max_new_tokens=64 if self.world else 256)
        self._parts: list[ReportFacts] = []

    # --- a stage -----------------------------------------------------------------------------

    def settings(self, name: str, defaults: Settings) -> dict[str, Any]:
        """What a stage is told: its defaults, and what the plan says otherwise."""
        return _merged(defaults, self.plan.stages.get(name) or {})

    def stage(self, name: str, defaults: Settings) -> AlignResult:
        """Run a stage, or load what it left.

        Args:
            name: of the stage.
            defaults: by the keys of a run's file; the plan's own win.
        """
        given = self.settings(name, defaults)
        if given.get("data") is None:
            raise ConfigError(
                f"stages.{name}.data must be given: the rows that the stage trains on. Or write "
                "world: chat."
            )
        told = {"run_dir": str(self.place(name)), "seed": self.plan.seed, **given}
        config = from_mapping(told, f"stage {name}")
        result = align(**{f.name: getattr(config, f.name) for f in fields(RunConfig)})
        gc.collect()
        return result

    def place(self, name: str) -> Path:
        """The run folder of a stage."""
        return self.plan.folder(f"{self.recipe.stages.index(name) + 1}-{name}")

    def model(self, name: str) -> str:
        """The model that a stage left."""
        return str(self.place(name) / "model")

    def by_size(self, full: int, quick: int) -> int:
        return quick if self.plan.quick else full

    # --- measuring ---------------------------------------------------------------------------

    def look(self, folder: str, judge: Reward) -> Policy:
        """What a policy answers to the held-out prompts, and makes of the tasks."""
        config = RunConfig(folder, SFT(), [], seed=self.plan.seed)
        wing = build_wing(config, "text", Runtime())
        asked = [row["prompt"] for row in self.prompts]
        answers = wing.sample(asked, self.generation, seed=self.plan.seed + 1)
        judged = by_reward(judge, self.prompts, [[answer] for answer in answers])
        scores = [one.scores[0] for one in judged]
        return Policy(folder, scores, measure(wing, self.tasks, self.generation))

    def arrived(
        self, name: str, before: Policy, after: Policy, by: str, more: Sequence[EvaluationRow] = ()
    ) -> None:
        """Note what a stage made of a policy."""
        gain = EvaluationRow.of(
            f"held-out prompts, by {by}",
            paired_difference(before.scores, after.scores),
            note="of the answer to each prompt, after the stage less before it",
        )
        self.note(name, [gain, *more, *compared(before.tax, after.tax)])

    def judge(self, name: str, folder: str, pairs: Any) -> None:
        """Note how often a reward model is right about held-out pairs."""
        reward = reward_of(folder, "text")
        rows = list(read_rows(pairs))
        found = by_reward(reward, rows, [_ends(row) for row in rows])
        rejected, chosen = ([one.scores[side] for one in found] for side in (0, 1))
        right = preference_rate(preferences(rejected, chosen))
        self.note(name, [EvaluationRow.of("held-out pairs it orders rightly", right)])

    def note(self, name: str, rows: Sequence[EvaluationRow]) -> None:
        """Put rows at the top of a stage's report, and the stage into the recipe's."""
        folder = RunFolder(self.place(name))
        stored = folder.read_result() or {}
        facts = replace(
            ReportFacts.from_dict(stored["facts"]),
            evaluation=tuple(rows),
            run_dir=str(self.place(name)),
            title=f"{len(self._parts) + 1}. {name.replace('_', ' ')}",
        )
        folder.write_result({**stored, "facts": facts.as_dict()})
        write_report(folder, facts)
        self._parts.append(facts)

    def report(self) -> Path:
        """The page that follows the model through its stages."""
        path = self.plan.folder("report.html")
        return write_index(path, self._parts, title=self.recipe.title)


def _ends(row: Mapping[str, Any]) -> list[Any]:
    """The worst and the best answer of a row of pairs or rankings."""
    if "chosen" in row:
        return [row["rejected"], row["chosen"]]
    ranks = row.get("ranking") or [-score for score in row["scores"]]
    return [row["responses"][ranks.index(end(ranks))] for end in (max, min)]


def _merged(first: Settings, second: Settings) -> dict[str, Any]:
    """Mappings put together, key by key; the second one's values win."""
    merged = dict(first)
    for key, value in second.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
