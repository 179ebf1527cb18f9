"""What a recipe is told: a YAML file with `recipe:` as a frozen value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.errors import ConfigError, refuse_unknown
from alignkit.schema import hints, read, refuse_unknown_keys

WORLDS = ("chat",)


@dataclass(frozen=True)
class Plan:
    """A recipe and what it is run on.

    Attributes:
        recipe: its name.
        run_dir: the folder; each stage has a run folder of its own in it.
        policy: the model that begins: a folder or hub name; None is the world's own.
        world: "chat", the tiny chat world that ships with alignkit: it has data for every stage,
            and a reward that is known and trains nothing. None: the stages name their data.
        tasks: for the alignment tax: `multiple_choice`, `exact_match` and `text`, data each.
        prompts: held-out prompts that the policies are compared on.
        rules: name -> text of the rules of a recipe that has some.
        quick: shows that everything runs, not how well it learns.
        seed: of all stages.
        stages: stage -> what differs from its defaults, by the keys of a run's file.
    """

    recipe: str
    run_dir: str
    policy: str | None = None
    world: str | None = None
    tasks: Mapping[str, str] | None = None
    prompts: str | None = None
    rules: Mapping[str, str] | None = None
    quick: bool = False
    seed: int = 0
    stages: Mapping[str, Any] = field(default_factory=dict)

    def folder(self, *parts: str) -> Path:
        return Path(self.run_dir).joinpath(*parts)


def read_plan(mapping: Mapping[str, Any], stages: Iterable[str], where: str) -> Plan:
    """Raises `ConfigError`, naming the key that is unknown, missing or of a wrong type."""
    try:
        known = hints(Plan)
        refuse_unknown_keys("", mapping, known)
        if mapping.get("run_dir") is None:
            raise ConfigError("run_dir must be given; a recipe goes from folder to folder.")
        plan = Plan(**{key: read(known[key], value, key) for key, value in mapping.items()})
        for name in plan.stages:
            refuse_unknown("stage", name, stages)
        if plan.world is not None:
            refuse_unknown("world", plan.world, WORLDS)
        elif plan.policy is None:
            raise ConfigError(
                "policy must be given: the folder or hub name of the model that begins. Or write "
                "world: chat, for the tiny model that ships with alignkit."
            )
        elif plan.prompts is None:
            raise ConfigError(
                "prompts must be given: held-out prompts that the stages are compared on."
            )
        return plan
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
