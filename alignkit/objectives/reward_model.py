"""Reward models: the preference objective over scores, in whose place a likelihood else stands.

A score is a log-ratio whose reference is 0, so pairs, rankings, weights, margins and soft labels
are those of `objectives.preference`. What differs is what is reported, and answers that were rated
one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alignkit.batches import Batch, Likelihood, Metrics
from alignkit.errors import DataError
from alignkit.losses import RatedScores
from alignkit.objectives.kinds import GROUPS, PAIRS, Kind
from alignkit.objectives.modifiers import mean


def _of_scores(kind: Kind) -> Kind:
    """A kind of comparison without what only likelihoods have."""

    def metrics(scores: Any, beta: float, weight: Tensor) -> Metrics:
        found = kind.metrics(scores, beta, weight)
        return {name: value for name, value in found.items() if name.startswith("rewards/")}

    return replace(kind, metrics=metrics)


def rated_scores(
    batch: Batch, policy: Likelihood, reference: Likelihood, **fields: Any
) -> RatedScores:
    """Groups of one, with what raters gave."""
    if batch.score is None or batch.num_answers != batch.num_groups:
        raise DataError(
            "A loss of rated answers needs rows with prompt, completion and score, or with "
            "prompt, responses and scores."
        )
    total, extras = policy.total, policy.extras
    return RatedScores(
        total,
        batch.score.to(total.device, torch.float32, non_blocking=True),
        logits=extras.get("logits"),
        values=extras.get("values"),
        mask=extras.get("token_mask"),
        **fields,
    )


@torch.no_grad()
def rated_metrics(scores: RatedScores, beta: float, weight: Tensor) -> Metrics:
    """Means of scores and ratings and of their squares, from which `explained` follows."""
    values = {
        "rewards/mean": scores.policy,
        "ratings/mean": scores.rating,
        "ratings/square": scores.rating.double() ** 2,
        "ratings/squared_error": (scores.policy.double() - scores.rating.double()) ** 2,
    }
    return {name: mean(value, weight) for name, value in values.items()}


def explained(means: Mapping[str, float]) -> dict[str, float]:
    """R^2 = 1 - mean squared error / variance of the ratings."""
    if "ratings/square" not in means:
        return {}
    spread = means["ratings/square"] - means["ratings/mean"] ** 2
    return {"ratings/r2": 1 - means["ratings/squared_error"] / spread} if spread > 0 else {}


RATED = Kind("rated", rated_scores, rated_metrics, derived=explained)
REWARD_KINDS: Mapping[str, Kind] = {
    "pairs": _of_scores(PAIRS),
    "groups": _of_scores(GROUPS),
    "rated": RATED,
}
"""Kind of rows -> how a reward model's scores of them are read and reported."""
