"""Rewards as users name them: a function, a scorer, or several with weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from alignkit.errors import ConfigError
from alignkit.parts import MODALITIES
from alignkit.protocols import Reward
from alignkit.rewards import WeightedReward


def reward_of(given: Any, modality: str, *, device: str = "cpu") -> Reward:
    """A reward from what a user gave.

    Args:
        given: a function `(prompts, responses, rows) -> scores`; "module:function", looked for in
            the working folder, too; the name of one of the wing's scorers, such as "pickscore", or
            "pickscore=WEIGHTS" with a path or hub name; or a list of `(reward, weight)`.
        modality: "text" or "image".
        device: where a scorer computes.

    Raises:
        ConfigError: it is none of these, or cannot be loaded.
    """
    if callable(given):
        return given
    if isinstance(given, str):
        return _named(given, modality, device)
    if isinstance(given, Sequence) and all(isinstance(one, Sequence) for one in given):
        parts = {}
        for number, (one, weight) in enumerate(given):
            reward = reward_of(one, modality, device=device)
            name = name_of(one, reward)
            parts[name if name not in parts else f"{name}_{number}"] = (reward, float(weight))
        return WeightedReward(parts)
    raise ConfigError(
        "A reward is a function of (prompts, responses, rows), 'module:function', a scorer's name, "
        f"or a list of (reward, weight); got {given!r}."
    )


def name_of(given: Any, reward: Reward) -> str:
    """What a reward is called in reports."""
    if isinstance(given, str):
        return given.partition("=")[0].rpartition(":")[2]
    return getattr(reward, "name", getattr(reward, "__name__", type(reward).__name__))


def _named(given: str, modality: str, device: str) -> Reward:
    name, _, weights = given.partition("=")
    if not weights and ":" in given:
        return function_of(given)
    scorers = f"{MODALITIES[modality]}.scorers"
    try:
        wing = import_module(scorers)
    except ModuleNotFoundError as error:
        if error.name != scorers:
            raise
        raise ConfigError(
            f"There are no scorers by name for {modality}; got {given!r}. Give a function, or "
            "'module:function'."
        ) from error
    found: Reward = wing.load_scorer(name, weights or None, device=device)
    return found


def function_of(given: str, what: str = "reward") -> Any:
    """The function that "module:function" names, looked for in the working folder, too.

    Raises:
        ConfigError: there is none.
    """
    module, _, name = given.rpartition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: Any = getattr(import_module(module), name, None)
    except ImportError as error:
        raise ConfigError(f"The {what} {given!r} cannot be imported: {error}.") from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise ConfigError(
            f"The {what} {given!r} must be a function; the module "
            f"has {'no such name' if found is None else type(found).__name__}."
        )
    return found
