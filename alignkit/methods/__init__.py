"""The methods that `align()` knows: what to optimise, named by the caller and never guessed.

A method is a frozen value. It says what it needs and which paper it is; the objective it becomes is
built by the roof. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from alignkit.methods.common import Timesteps, TimestepWeighting, modifiers
from alignkit.methods.preference import DPO, KTO, Divergence
from alignkit.methods.rejection import RejectionSampling
from alignkit.methods.supervised import SFT, LossOn

Method = DPO | KTO | SFT | RejectionSampling
Preference = DPO | KTO
"""The methods whose losses compare policy and reference, or the answers of a row."""

METHODS: Mapping[str, type[Method]] = MappingProxyType(
    {cls.name: cls for cls in (DPO, KTO, SFT, RejectionSampling)}
)
"""Name in YAML -> method."""

__all__ = [
    "DPO",
    "KTO",
    "METHODS",
    "SFT",
    "Divergence",
    "LossOn",
    "Method",
    "Preference",
    "RejectionSampling",
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
