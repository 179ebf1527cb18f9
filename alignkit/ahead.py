"""The pass of a cached reference on its own, before any run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignkit.api import config_of
from alignkit.assemble import check_places
from alignkit.cached import expect
from alignkit.config import RunConfig, check, resolve_data_options
from alignkit.data_sources import check_data, sources_of
from alignkit.methods import Method
from alignkit.objectives.policy_gradient import PolicyGradientObjective
from alignkit.parts import build_objective, build_wing, modality_of
from alignkit.reference_cache import StoredReference
from alignkit.reference_options import CachedReference
from alignkit.runtime import Runtime, pick_precision


@dataclass(frozen=True)
class CachedPass:
    """What a pass left.

    Attributes:
        folder: where the numbers of this reference are.
        known: how many numbers the folder holds.
        computed: answers that were evaluated now; 0 where nothing was missing.
    """

    folder: Path
    known: int
    computed: int


def cache_reference(
    policy: Any, method: Method | None = None, data: Any = None, **arguments: Any
) -> CachedPass:
    """Compute the reference's log-likelihoods that a run would ask for, and train nothing.

    Runs with `reference=CachedReference(...)` find them. A pass that was stopped goes on where it
    was.

    Args:
        policy, method, data, arguments: as `align` takes them, or one YAML file. A reference that
            is no `CachedReference` becomes one. What does not concern the reference's numbers
            plays no part.

    Raises:
        ConfigError: for a run that has no reference to cache.
    """
    return compute_ahead(config_of(policy, method, data, **arguments))


def compute_ahead(config: RunConfig) -> CachedPass:
    """The same for a run as one value."""
    config = _without_outcome(config)
    modality = modality_of(config.policy)
    check(config, modality)
    check_places(config, modality)
    check_data(config, modality)
    runtime = Runtime(
        sharding=config.trainer.sharding, precision=pick_precision(config.trainer.precision)
    )
    wing = build_wing(config, modality, runtime)
    try:
        objective, _ = build_objective(config, wing, runtime)
        assert not isinstance(objective, PolicyGradientObjective), "it has no cached reference"
        options = resolve_data_options(config, modality, wing.default_options)
        expect(config, objective, *sources_of(config, wing, options, objective, runtime))
        for name, module in objective.trainable.modules.items():
            objective.trainable.replace(name, runtime.wrap(module))
        objective.prepare(runtime)
    finally:
        wing.undo()
    reference = getattr(objective, "reference", None)
    assert isinstance(reference, StoredReference)
    return CachedPass(reference.store.folder, len(reference.table), reference.computed)


def _without_outcome(config: RunConfig) -> RunConfig:
    """The run as far as its reference goes: nothing is trained, and nothing written but numbers."""
    reference = config.reference
    if not isinstance(reference, CachedReference):
        reference = CachedReference(reference)
    trainer = replace(
        config.trainer,
        epochs=config.trainer.epochs or (None if config.trainer.max_steps else 1.0),
        save_every=None,
        sample_every=None,
        keep_best=None,
        early_stop=None,
        trackers=(),
        push_to_hub=None,
    )
    return replace(
        config,
        reference=replace(reference, ahead=True),
        trainer=trainer,
        run_dir=None,
        resume="auto",
    )
