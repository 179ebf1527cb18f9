"""alignkit aligns language models and SDXL pipelines with preferences.

    from alignkit import align, DPO, LoRA

    align("Qwen/Qwen2.5-0.5B-Instruct", DPO(beta=0.1), "pairs.jsonl", run_dir="runs/chat")

Options, methods and errors are light and are here at once. What needs torch is imported on first
use, so that `import alignkit` and the command line answer quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from alignkit.betas import convert_beta
from alignkit.errors import (
    AlignkitError,
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
)
from alignkit.methods import (
    A2C,
    DPO,
    GRPO,
    KTO,
    PPO,
    REINFORCE,
    RLOO,
    SFT,
    RejectionSampling,
    RewardModel,
    methods,
)
from alignkit.mixtures import Mixture
from alignkit.options import (
    EarlyStop,
    GenerationOptions,
    ImageOptions,
    LoRA,
    ScoreLabels,
    TextOptions,
    TrainerOptions,
)
from alignkit.reference_options import (
    AdapterReference,
    CachedReference,
    EMAReference,
    NoiseBank,
    PrecomputedReference,
    SyncedReference,
)

if TYPE_CHECKING:
    from alignkit.ahead import cache_reference
    from alignkit.api import AlignResult, Run, align, build
    from alignkit.caching import cache_images
    from alignkit.cite import citations
    from alignkit.combined_rewards import RuleReward, SafetyHelpfulness
    from alignkit.evaluation import Evaluation, SheetResult, evaluate, fill_sheet, read_sheets
    from alignkit.export import export_merged
    from alignkit.labeller import sample_preferences
    from alignkit.length_control import length_controlled_win_rate
    from alignkit.precompute import precompute_reference
    from alignkit.rewards import WeightedReward
    from alignkit.statistics import paired_difference, win_rate
    from alignkit.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "A2C",
    "DPO",
    "GRPO",
    "KTO",
    "PPO",
    "REINFORCE",
    "RLOO",
    "SFT",
    "AdapterReference",
    "AlignResult",
    "AlignkitError",
    "CachedReference",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EMAReference",
    "EarlyStop",
    "Evaluation",
    "GenerationOptions",
    "ImageOptions",
    "LoRA",
    "Mixture",
    "NoiseBank",
    "NonFiniteError",
    "PrecomputedReference",
    "RejectionSampling",
    "RewardModel",
    "RuleReward",
    "Run",
    "SafetyHelpfulness",
    "ScoreLabels",
    "SheetResult",
    "SyncedReference",
    "TextOptions",
    "Trainer",
    "TrainerOptions",
    "WeightedReward",
    "align",
    "align_rounds",
    "build",
    "cache_images",
    "cache_reference",
    "citations",
    "convert_beta",
    "evaluate",
    "export_merged",
    "fill_sheet",
    "length_controlled_win_rate",
    "methods",
    "paired_difference",
    "precompute_reference",
    "read_sheets",
    "sample_preferences",
    "win_rate",
]

_LAZY = {
    "Evaluation": "alignkit.evaluation",
    "SheetResult": "alignkit.evaluation",
    "evaluate": "alignkit.evaluation",
    "fill_sheet": "alignkit.evaluation",
    "read_sheets": "alignkit.evaluation",
    "length_controlled_win_rate": "alignkit.length_control",
    "paired_difference": "alignkit.statistics",
    "win_rate": "alignkit.statistics",
    "AlignResult": "alignkit.api",
    "Run": "alignkit.api",
    "Trainer": "alignkit.trainer",
    "align": "alignkit.api",
    "align_rounds": "alignkit.rounds",
    "build": "alignkit.api",
    "cache_images": "alignkit.caching",
    "cache_reference": "alignkit.ahead",
    "citations": "alignkit.cite",
    "export_merged": "alignkit.export",
    "precompute_reference": "alignkit.precompute",
    "RuleReward": "alignkit.combined_rewards",
    "SafetyHelpfulness": "alignkit.combined_rewards",
    "WeightedReward": "alignkit.rewards",
    "sample_preferences": "alignkit.labeller",
}
"""Name -> the module that has it, imported on first use."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'alignkit' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
