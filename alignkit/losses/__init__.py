"""The shared loss core: pure functions of a few numbers per example, for every modality."""

from alignkit.losses.preference import PREFERENCE_LOSSES
from alignkit.losses.scores import GroupScores, PairScores, UnpairedScores
from alignkit.losses.table import Loss, PairLoss

__all__ = [
    "PREFERENCE_LOSSES",
    "GroupScores",
    "Loss",
    "PairLoss",
    "PairScores",
    "UnpairedScores",
]
