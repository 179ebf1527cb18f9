"""Metrics of likelihoods that are errors at drawn places: by stratum, and in the error's unit."""

from __future__ import annotations

from collections.abc import Iterator
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
    weight: Tensor = scored.weight
    found = {}
    for name, inside in _strata(backend, micro, weight):
        metrics = kind.metrics(scored.scores, beta, weight * inside)
        if ACCURACY in metrics:
            found[f"accuracy/{name}"] = metrics[ACCURACY]
    return found


def losses_by_stratum(backend: Any, micro: Micro, losses: Tensor, weight: Tensor) -> Metrics:
    """loss/NAME of each stratum: the mean of the rows' losses (G,), by their weights (G,)."""
    if not isinstance(backend, DrawsInStrata):
        return {}
    return {
        f"loss/{name}": ((losses * weight * inside).sum(), (weight * inside).sum())
        for name, inside in _strata(backend, micro, weight)
    }


def _strata(backend: DrawsInStrata, micro: Micro, like: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Of each stratum its name, and (G,) which groups' draws are from it."""
    names, place = backend.strata(micro.batch, micro.key)
    place = place.to(like.device)
    for number, name in enumerate(names):
        yield name, place == number
