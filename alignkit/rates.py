"""Default peak learning rates."""

from __future__ import annotations

from collections.abc import Mapping

from alignkit.methods import SFT, Method, RewardModel

Rates = Mapping[tuple[str, bool], float]

LEARNING_RATES: Rates = {
    # Full: the DPO default of TRL; LoRA: the middle of the 5e-6 .. 5e-5 in common use.
    ("text", False): 1e-6,
    ("text", True): 1e-5,
    # LoRA: between diffusers' recipe and the launcher of Wallace et al.; full: starting point for
    # batches around 64 (that launcher's 2.05e-5 belongs to batches of 2048).
    ("image", False): 2e-6,
    ("image", True): 1e-5,
}
"""(modality, with adapter) -> DPO's default peak learning rate."""

SFT_RATES: Rates = {
    # Full: Llama 2 and TRL; LoRA: ten times as much, as is usual.
    ("text", False): 2e-5,
    ("text", True): 2e-4,
    # Those of diffusers' text-to-image recipes.
    ("image", False): 1e-5,
    ("image", True): 1e-4,
}
"""(modality, with adapter) -> the default peak learning rate of supervised fine-tuning."""

REWARD_RATES: Rates = {
    # Full: near InstructGPT's 9e-6; LoRA: ten times as much.
    ("text", False): 1e-5,
    ("text", True): 1e-4,
}
"""(modality, with adapter) -> the default peak learning rate of reward models."""

_OF: Mapping[type, Rates] = {SFT: SFT_RATES, RewardModel: REWARD_RATES}


def default_rate(method: Method, modality: str, adapted: bool) -> float:
    """The peak learning rate of a run that names none; `adapted`: whether an adapter is trained."""
    return _OF.get(type(method), LEARNING_RATES)[modality, adapted]
