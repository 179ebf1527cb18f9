"""From an online method's options to its objective: temperature, reference and critic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from alignkit.capabilities import ScoresStates, SharesTrunk, Tempers
from alignkit.config import RunConfig
from alignkit.kl_control import AdaptiveKL, ConstraintKL, FixedKL, KLController
from alignkit.methods import PolicyGradient
from alignkit.objectives.critics import Critic, OwnCritic, SharedCritic
from alignkit.objectives.policy_gradient import PolicyGradientObjective
from alignkit.protocols import Wing
from alignkit.references import OtherModel, build_reference


def policy_gradient(
    config: RunConfig, wing: Wing, other_model: OtherModel
) -> tuple[PolicyGradientObjective, dict[str, Any]]:
    """The objective of an online method, and what was filled in."""
    method: Any = config.method
    assert method.online and isinstance(wing.backend, Tempers)
    wing.backend.temper(config.generation.temperature)  # before a copy of it is made
    kind, reference = "none", None
    if method.kl_coef:
        kind, reference = build_reference(config, wing, True, other_model)
    critic = None
    if method.critic is not None:
        critic = _CRITICS[method.critic](config, wing)
    wing.backend.temper(config.generation.temperature)  # of a reference that is another model, too
    objective = PolicyGradientObjective(
        wing.backend,
        method,
        reference=reference,
        critic=critic,
        seed=config.seed,
        budget=config.trainer.micro_batch,
    )
    return objective, {"kl_coef": method.kl_coef, "reference": kind}


def _separate(config: RunConfig, wing: Any) -> Critic:
    return _own("policy", config, wing)


def _of_reward_model(config: RunConfig, wing: Any) -> Critic:
    return _own(str(config.reward), config, wing)


def _own(init: str, config: RunConfig, wing: Any) -> Critic:
    method: Any = config.method
    assert isinstance(wing, ScoresStates)
    backend = wing.scalar(init, adapter=config.adapter)
    held: Any = wing
    held.backend.beside.append(backend.module)  # computes the same rows, and must be able to
    return OwnCritic(backend, weight=method.vf_coef, warmup=method.critic_warmup)


def _shared(config: RunConfig, wing: Any) -> Critic:
    method: Any = config.method
    assert isinstance(wing, SharesTrunk)
    return SharedCritic(wing.value_head(), weight=method.vf_coef, warmup=method.critic_warmup)


_CRITICS: Mapping[str, Callable[[RunConfig, Any], Critic]] = {
    "separate": _separate,
    "shared": _shared,
    "reward_model": _of_reward_model,
}
"""`critic` of a method -> what makes it."""

_CONTROLLERS: Mapping[str, Callable[[Any], KLController]] = {
    "fixed": lambda method: FixedKL(method.kl_coef),
    "adaptive": lambda method: AdaptiveKL(method.kl_coef, method.kl_target),
    "constraint": lambda method: ConstraintKL(method.kl_coef, method.kl_target),
}


def controller_of(method: PolicyGradient) -> KLController:
    """What sets the strength of a method's KL."""
    return _CONTROLLERS[method.kl_controller](method)
