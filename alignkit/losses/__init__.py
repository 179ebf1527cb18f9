"""The shared loss core: pure functions of a few numbers per example, for every modality."""

from types import MappingProxyType

from alignkit.losses import batchwise, offsets, pointwise, preference, reference_free
from alignkit.losses.divergences import DIVERGENCES
from alignkit.losses.group import GROUP_LOSSES
from alignkit.losses.mixture import WeightedSum, weighted_sum
from alignkit.losses.reward_model import REWARD_LOSSES, RatedScores, RewardLoss
from alignkit.losses.scores import GroupScores, PairScores, UnpairedScores
from alignkit.losses.supervised import SUPERVISED_LOSSES, SupervisedLoss
from alignkit.losses.table import GroupLoss, Loss, PairLoss, State, UnpairedLoss
from alignkit.losses.unpaired import UNPAIRED_LOSSES

PREFERENCE_LOSSES = MappingProxyType(
    {
        row.name: row
        for module in (preference, offsets, pointwise, batchwise, reference_free)
        for row in module.ROWS
    }
)
"""Name -> pairwise loss."""

LOSSES = MappingProxyType({**PREFERENCE_LOSSES, **GROUP_LOSSES, **UNPAIRED_LOSSES})
"""Name -> loss of answers that are compared, with a reference or with one another; names are unique
over all tables, that of demonstrations included.
"""

__all__ = [
    "DIVERGENCES",
    "GROUP_LOSSES",
    "LOSSES",
    "PREFERENCE_LOSSES",
    "REWARD_LOSSES",
    "SUPERVISED_LOSSES",
    "UNPAIRED_LOSSES",
    "GroupLoss",
    "GroupScores",
    "Loss",
    "PairLoss",
    "PairScores",
    "RatedScores",
    "RewardLoss",
    "State",
    "SupervisedLoss",
    "UnpairedLoss",
    "UnpairedScores",
    "WeightedSum",
    "weighted_sum",
]
