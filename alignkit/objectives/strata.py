"""Metrics of likelihoods that are errors at drawn places: by stratum, and in the error's unit."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from alignkit.batches import Metrics
from alignkit.capabilities import DrawsInStrata
from alignkit.objectives.kinds import Kind
from alignkit.objectives.pieces import Micro

ACCURACY = "rewards/accuracies"


def with_errors(backend: Any, metrics: Metrics) -> Metrics:
    """The metrics, and error/chosen and error/rejected: how far the policy's error is above the
    reference's, which is what the log-ratio says in another unit.
    """
    if not isinstance(backend, DrawsInStrata):
        return metrics
    found = {}
    for side in ("chosen", "rejected"):
        if (pair := metrics.get(f"log_ratio/{side}")) is not None:
            found[f"error/{side}"] = backend.error_scale * pair[0], pair[1]
    return metrics | found


def by_stratum(backend: Any, micro: Micro, kind: Kind, beta: float, scored: Any) -> Metrics:
    """accuracy/NAME of each stratum that the draws of a held-out piece are from."""
    if not isinstance(backend, DrawsInStrata):
        return {}
    names, place = backend.strata(micro.batch, micro.key)
    weight: Tensor = scored.weight
    place = place.to(weight.device)
    found = {}
    for number, name in enumerate(names):
        metrics = kind.metrics(scored.scores, beta, weight * (place == number))
        if ACCURACY in metrics:
            found[f"accuracy/{name}"] = metrics[ACCURACY]
    return found
