"""The methods that `align()` knows: what to optimise, named by the caller and never guessed.

A method is a frozen value. It says what it needs and which paper it is; the objective it becomes is
built by the roof. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from alignkit.methods.common import Timesteps, TimestepWeighting, modifiers
from alignkit.methods.online import Online
from alignkit.methods.policy_gradient import A2C, GRPO, PPO, REINFORCE, RLOO
from alignkit.methods.preference import DPO, KTO, Divergence
from alignkit.methods.rejection import RejectionSampling
from alignkit.methods.reward_model import RewardModel
from alignkit.methods.supervised import SFT, LossOn

PolicyGradient = PPO | A2C | REINFORCE | RLOO | GRPO
"""The methods whose policy writes the answers that it learns from."""
Method = DPO | KTO | SFT | RewardModel | RejectionSampling | PolicyGradient
Preference = DPO | KTO
"""The methods whose losses compare policy and reference, or the answers of a row."""

METHODS: Mapping[str, type[Method]] = MappingProxyType(
    {
        cls.name: cls
        for cls in (
            DPO,
            KTO,
            SFT,
            RewardModel,
            RejectionSampling,
            PPO,
            A2C,
            REINFORCE,
            RLOO,
            GRPO,
        )
    }
)
"""Name in YAML -> method."""

__all__ = [
    "A2C",
    "DPO",
    "GRPO",
    "KTO",
    "METHODS",
    "PPO",
    "REINFORCE",
    "RLOO",
    "SFT",
    "Divergence",
    "LossOn",
    "Method",
    "Online",
    "PolicyGradient",
    "Preference",
    "RejectionSampling",
    "RewardModel",
    "TimestepWeighting",
    "Timesteps",
    "methods",
    "modifiers",
]


def methods() -> list[dict[str, str]]:
    """Every method with its paper and what it needs."""
    return [
        {"name": name, "class": cls.__name__, "paper": cls.paper, "needs": cls.needs}
        for name, cls in METHODS.items()
    ]
