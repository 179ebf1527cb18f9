"""Rewards as users name them: a function, a scorer, or several with weights."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from alignkit.combined_rewards import RuleReward, SafetyHelpfulness
from alignkit.errors import ConfigError, refuse_unknown
from alignkit.parts import MODALITIES
from alignkit.protocols import Reward
from alignkit.rewards import WeightedReward
from alignkit.schema import refuse_unknown_keys


def reward_of(given: Any, modality: str, *, device: str = "cpu") -> Reward:
    """A reward from what a user gave.

    Args:
        given: a function `(prompts, responses, rows) -> scores`; the folder of a reward model;
            "module:function", looked for in the working folder, too; the name of one of the wing's
            scorers, such as "pickscore", or "pickscore=WEIGHTS" with a path or hub name; a list of
            `(reward, weight)`; or a mapping with a `kind` of `COMBINED` and its arguments.
        modality: "text" or "image".
        device: where a scorer computes.

    Raises:
        ConfigError: it is none of these, or cannot be loaded.
    """
    if callable(given):
        return given
    if isinstance(given, (str, Path)):
        return _named(str(given), modality, device)
    if isinstance(given, Mapping):
        return _combined(given, modality, device)
    if isinstance(given, Sequence) and all(isinstance(one, Sequence) for one in given):
        parts = {}
        for number, (one, weight) in enumerate(given):
            reward = reward_of(one, modality, device=device)
            name = name_of(one, reward)
            parts[name if name not in parts else f"{name}_{number}"] = (reward, float(weight))
        return WeightedReward(parts)
    raise ConfigError(
        "A reward is a function of (prompts, responses, rows), the folder of a reward model, "
        "'module:function', a scorer's name, a list of (reward, weight), or a mapping with a kind; "
        f"got {given!r}."
    )


COMBINED: Mapping[str, tuple[type, tuple[str, ...]]] = {
    "safety_helpfulness": (SafetyHelpfulness, ("safety", "helpfulness")),
    "rules": (RuleReward, ("rule_model", "preference")),
}
"""Kind -> the reward, and which of its arguments are rewards themselves."""


def _combined(given: Mapping[str, Any], modality: str, device: str) -> Reward:
    arguments = dict(given)
    kind = arguments.pop("kind", None)
    refuse_unknown("reward.kind", kind, COMBINED)
    make, rewards = COMBINED[kind]
    known = [name for name in inspect.signature(make).parameters if name != "self"]
    refuse_unknown_keys("reward", arguments, known)
    needed = [
        name
        for name, one in inspect.signature(make).parameters.items()
        if one.default is inspect.Parameter.empty
    ]
    if missing := [name for name in needed if name not in arguments]:
        raise ConfigError(
            f"A reward of kind {kind!r} has {', '.join(needed)}; {missing} is left out."
        )
    for name in rewards:
        if arguments.get(name) is not None:
            arguments[name] = reward_of(arguments[name], modality, device=device)
    found: Reward = make(**arguments)
    return found


def name_of(given: Any, reward: Reward) -> str:
    """What a reward is called in reports."""
    if isinstance(given, Mapping):
        return str(given.get("kind"))
    if isinstance(given, (str, Path)):
        return Path(str(given).partition("=")[0].rpartition(":")[2]).name
    return getattr(reward, "name", getattr(reward, "__name__", type(reward).__name__))


def _named(given: str, modality: str, device: str) -> Reward:
    if Path(given).is_dir():
        return _model(given, modality, device)
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


def _model(folder: str, modality: str, device: str) -> Reward:
    """The reward that a folder holds."""
    load = getattr(import_module(MODALITIES[modality]), "load_reward", None)
    if load is None:
        raise ConfigError(
            f"There are no reward models in folders for {modality}; got {folder!r}. Give a "
            "scorer's name, a function, or 'module:function'."
        )
    found: Reward = load(folder, device=device)
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
