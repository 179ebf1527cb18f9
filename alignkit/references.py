"""Which reference a run compares with: from the option to the object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from alignkit.config import RunConfig
from alignkit.errors import ConfigError, DataError
from alignkit.protocols import Reference, Wing
from alignkit.reference import (
    FrozenAdapter,
    FrozenModel,
    MovingReference,
    NoReference,
    SwitchedAdapter,
    TableReference,
)
from alignkit.reference_bank import BankedReference
from alignkit.reference_options import (
    REFERENCE_KINDS,
    AdapterReference,
    CachedReference,
    EMAReference,
    NoiseBank,
    PrecomputedReference,
    SyncedReference,
)
from alignkit.rows import read_rows

OtherModel = Callable[[Any], Wing]
"""Loads another model as a wing, without an adapter."""


def build_reference(
    config: RunConfig, wing: Wing, needs_reference: bool | None, other_model: OtherModel
) -> tuple[str, Reference]:
    """What the report calls the reference, and the reference itself.

    It is a snapshot of the model handed in; taken before anything is wrapped or trained.
    """
    wanted = config.reference
    if needs_reference is False or (needs_reference is None and wanted == "none"):
        return "none", NoReference()
    if isinstance(wanted, NoiseBank):
        return _banked(wanted, config, wing, other_model)
    if type(wanted) in _MAKERS:
        return _MAKERS[type(wanted)](wanted, wing)
    if is_model(wanted):
        return "model", FrozenModel(other_model(wanted).backend.module)
    return _named(wanted, config, wing)


def is_model(reference: Any) -> bool:
    """Whether a reference is another model, and not one of the policy's own states."""
    named = isinstance(reference, str) and reference in _NAMED
    return not named and type(reference) not in REFERENCE_KINDS.values()


def model_of(reference: Any) -> Any:
    """The other model that a reference is, or has its numbers from; None if there is none."""
    kept = isinstance(reference, (CachedReference, NoiseBank))
    inner = reference.of if kept else reference
    return inner if is_model(inner) else None


_NAMED = ("auto", "frozen", "adapter_off", "none")


def _named(wanted: str, config: RunConfig, wing: Wing) -> tuple[str, Reference]:
    kind = kind_of(wanted, config, wing)
    return kind, NAMED[kind](wing)


NAMED: Mapping[str, Callable[[Wing], Reference]] = {
    "adapter_off": lambda wing: SwitchedAdapter(wing.backend, wing.adapters_off),
    "frozen_adapter": lambda wing: FrozenAdapter(wing.backend),
    "frozen": lambda wing: FrozenModel.copy_of(wing.backend.module),
}
"""Kind -> what makes such a reference of a wing."""


def kind_of(wanted: str, config: RunConfig, wing: Wing) -> str:
    """Which of `NAMED` the reference is.

    Raises:
        ConfigError: for an adapter that is to be off where there is none.
    """
    assert wanted != "none", "refused before anything was loaded"
    if wanted == "adapter_off" and wing.adapter == "none":
        raise ConfigError(
            'reference="adapter_off" needs an adapter on the policy, and there is none. Give '
            'adapter=LoRA(...), or reference="frozen".'
        )
    # DoRA writes each weight as a norm times a direction, which is the base's up to rounding only.
    exact = config.adapter is None or config.adapter.kind != "dora"
    fresh = wing.adapter == "fresh"
    if wanted == "adapter_off" or (wanted == "auto" and fresh and exact):
        return "adapter_off"
    if wing.adapter == "continued" or (wanted == "auto" and fresh):
        # The adapter as it stands is the start: only its own tensors need a copy.
        return "frozen_adapter"
    return "frozen"


def adapter_reference(option: AdapterReference, wing: Wing) -> tuple[str, Reference]:
    """The policy with another of its adapters on."""
    if option.name in wing.trained_adapters():
        raise ConfigError(
            f"reference=AdapterReference({option.name!r}) names the adapter that is trained: it "
            "would move with the policy. Name another one, or make another one active."
        )
    switched = SwitchedAdapter(wing.backend, partial(wing.adapter_on, option.name))
    return f"adapter {option.name}", switched


def _ema(option: EMAReference, wing: Wing) -> tuple[str, Reference]:
    name = f"moving average (decay {option.decay:g}, every {option.every})"
    return name, MovingReference(wing.backend, every=option.every, mix=1 - option.decay)


def _synced(option: SyncedReference, wing: Wing) -> tuple[str, Reference]:
    name = f"synced (every {option.every}, mix {option.mix:g})"
    return name, MovingReference(wing.backend, every=option.every, mix=option.mix)


def _precomputed(option: PrecomputedReference, wing: Wing) -> tuple[str, Reference]:
    table = option.table if isinstance(option.table, Mapping) else _read_table(option.table)
    return f"precomputed ({len(table)} rows)", TableReference(table)


def _banked(
    option: NoiseBank, config: RunConfig, wing: Wing, other_model: OtherModel
) -> tuple[str, Reference]:
    kind, inner = build_reference(replace(config, reference=option.of), wing, True, other_model)
    wing.backend.bank = option.draws  # type: ignore[attr-defined]
    reference = BankedReference(
        inner,
        wing.backend,
        draws=option.draws,
        seed=config.seed,
        budget=config.trainer.micro_batch,
        rows=config.trainer.batch_size,
        keep=config.eval_data is not None,
    )
    return f"{kind}, on a bank of {option.draws} draws per row", reference


_MAKERS: Mapping[type, Callable[[Any, Wing], tuple[str, Reference]]] = {
    AdapterReference: adapter_reference,
    EMAReference: _ema,
    SyncedReference: _synced,
    PrecomputedReference: _precomputed,
}
"""Option class -> what makes its reference."""


def _read_table(path: Any) -> dict[int, list[float]]:
    rows = read_rows(path)
    try:
        return {int(row["row"]): [float(value) for value in row["logps"]] for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            "A table of reference log-likelihoods has the columns row (a number) and logps (a "
            f"list of numbers, one per answer); {rows.name} has a row without: {error!r}. Write it "
            "with precompute_reference."
        ) from error
