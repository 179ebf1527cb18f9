"""Cached references: where their numbers come from, and what they will be asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from alignkit.adapters import active_adapters
from alignkit.batches import Batch
from alignkit.config import RunConfig
from alignkit.identity import arithmetic, identity, remember, remembered
from alignkit.places import cache_folder
from alignkit.protocols import Backend, Reference, Wing
from alignkit.reference import FrozenModel, SwitchedAdapter
from alignkit.reference_cache import StoredReference
from alignkit.reference_options import AdapterReference, CachedReference
from alignkit.reference_store import ReferenceStore
from alignkit.references import NAMED, OtherModel, adapter_reference, is_model, kind_of
from alignkit.sources import RowSource
from alignkit.stream_source import StreamSource


def cached_reference(
    option: CachedReference, config: RunConfig, wing: Wing, other_model: OtherModel
) -> tuple[str, Reference]:
    """The reference `option.of`, with its numbers kept on disk."""
    root = cache_folder("references", option.folder)
    origin = _origin(option.of, config, wing, other_model, root)
    reference = StoredReference(
        ReferenceStore(root, origin.identity),
        at_start=origin.at_start,
        live=None if option.ahead else origin.live(),
        budget=config.trainer.micro_batch,
    )
    return f"{origin.kind}, cached", reference


@dataclass(frozen=True)
class _Origin:
    """Where the numbers of a cached reference come from.

    Attributes:
        kind: what the report calls it.
        identity: what its numbers depend on.
        at_start: makes it, as long as nothing has been trained, with what splits its batches.
        live: makes it so that it holds later, too.
    """

    kind: str
    identity: Mapping[str, Any]
    at_start: Callable[[], tuple[Backend, Reference]]
    live: Callable[[], Reference]


def _origin(of: Any, config: RunConfig, wing: Wing, other_model: OtherModel, root: Path) -> _Origin:
    if is_model(of):
        return _another(of, wing, other_model, root)
    autocast = autocast_of(wing)

    def policy() -> tuple[Backend, Reference]:
        # Before the first step the policy is what a frozen copy of it would be.
        return wing.backend, SwitchedAdapter(wing.backend, nullcontext)

    if isinstance(of, AdapterReference):
        kind, switched = adapter_reference(of, wing)
        found = identity(wing.policy, autocast=autocast, adapters=[of.name])
        return _Origin(kind, found, lambda: (wing.backend, switched), lambda: switched)
    kind = kind_of(of, config, wing)
    live = partial(NAMED[kind], wing)
    if wing.adapter == "continued" and kind != "adapter_off":
        on = wing.trained_adapters()
        return _Origin(kind, identity(wing.policy, autocast=autocast, adapters=on), policy, live)
    # A fresh adapter computes as its base.
    loaded = f"{arithmetic(autocast)}, {'trained' if wing.adapter == 'none' else 'frozen'}"
    path, known = remembered(root, config.policy, loaded)
    if known is None:
        known = identity(wing.policy, autocast=autocast)
        remember(path, known)
    off = kind == "adapter_off"
    return _Origin(kind, known, (lambda: (wing.backend, live())) if off else policy, live)


def _another(of: Any, wing: Wing, other_model: OtherModel, root: Path) -> _Origin:
    """Another model; one in an unchanged folder is loaded only when a number is missing."""
    made: list[Wing] = []

    def loaded() -> Wing:
        return made.pop() if made else other_model(of)

    def at_start() -> tuple[Backend, Reference]:
        other = loaded()
        # It computes by itself, and no batch of the policy's.
        getattr(wing.backend, "beside", [other.backend.module]).remove(other.backend.module)
        return other.backend, FrozenModel(other.backend.module)

    autocast = autocast_of(wing)
    how = f"{arithmetic(autocast)}, {'trained' if wing.adapter == 'none' else 'frozen'}"
    path, known = remembered(root, of, how)
    if known is None:
        made.append(other_model(of))
        model = made[0].policy
        known = identity(model, autocast=autocast, adapters=active_adapters(model))
        remember(path, known)
    return _Origin("model", known, at_start, lambda: FrozenModel(loaded().backend.module))


def expect(
    config: RunConfig,
    objective: Any,
    source: RowSource | StreamSource,
    eval_sources: Mapping[str, RowSource],
) -> None:
    """Tell a cached reference what it will be asked for."""
    reference = getattr(objective, "reference", None)
    if not isinstance(reference, StoredReference) or reference.live is not None:
        return
    steps = config.trainer.max_steps or source.total_steps
    assert steps is not None

    def batches() -> Iterator[Batch]:
        yield from source.preview(steps)
        for held_out in eval_sources.values():
            assert held_out.total_steps is not None
            yield from held_out.preview(held_out.total_steps)

    reference.expect(batches, objective.modifiers.of_both)


def autocast_of(wing: Wing) -> Any:
    """The dtype that a text wing computes in, None for that of its weights."""
    return getattr(wing.backend.module, "autocast", None)
