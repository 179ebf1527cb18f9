"""Weighted sums of losses, such as MPO (Wang et al. 2024, 2411.10442): a row made of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from alignkit.errors import ConfigError, refuse_unknown
from alignkit.losses.table import Loss, State

Part = tuple[float, Loss]


@dataclass(frozen=True)
class WeightedSum(Loss):
    """sum over parts of weight * loss, each part with its own handling of labels and state.

    A given keyword goes to every part that has it; a part that got none keeps its own default.

    Attributes:
        parts: (weight, row) of each.
    """

    parts: tuple[Part, ...] = ()

    @property
    def keywords(self) -> Mapping[str, Any]:
        return {name: value for _, row in self.parts for name, value in row.keywords.items()}

    def probe(self) -> Any:
        return self.parts[0][1].probe()


def weighted_sum(weights: Mapping[str, float], table: Mapping[str, Loss]) -> WeightedSum:
    """A row that is a weighted sum of rows of one table.

    It needs what any part needs and refuses what any part refuses. Its default beta is the parts',
    where they agree; else the wing has none and beta must be given.

    Args:
        weights: name -> weight, above 0.
        table: `PREFERENCE_LOSSES`, `GROUP_LOSSES` or `UNPAIRED_LOSSES`.

    Raises:
        ConfigError: for no parts, an unknown name, or a weight that is not above 0.
    """
    if not weights:
        raise ConfigError('A sum of losses names at least one, as in {"sigmoid": 0.8, "hinge": 1}.')
    for name, weight in weights.items():
        refuse_unknown("loss", name, table)
        if isinstance(weight, bool) or not (isinstance(weight, (int, float)) and weight > 0):
            raise ConfigError(f"The weight of loss {name!r} must be above 0; got {weight!r}.")
    parts = tuple((float(weight), table[name]) for name, weight in weights.items())
    rows = [row for _, row in parts]
    scale_free = all(row.scale_free and _unscaled(row) for row in rows)
    laws = frozenset.intersection(*(row.laws for row in rows))
    return WeightedSum(
        name=" + ".join(f"{weight:g} {row.name}" for weight, row in parts),
        function=_sum_of(parts),
        paper="; ".join(dict.fromkeys(row.paper for row in rows)),
        equation=" + ".join(f"{weight:g} [{row.equation}]" for weight, row in parts),
        betas={
            wing: beta
            for wing, beta in rows[0].betas.items()
            if all(row.betas.get(wing) and row.betas[wing].value == beta.value for row in rows)
        },
        laws=laws if scale_free else laws - {"scaling"},
        at_reference=_at_reference(parts),
        needs_reference=any(row.needs_reference for row in rows),
        coupled=any(row.coupled for row in rows),
        scale_free=scale_free,
        modalities=tuple(m for m in rows[0].modalities if all(m in r.modalities for r in rows)),
        needs=tuple(dict.fromkeys(name for row in rows for name in row.needs)),
        refuses=MappingProxyType({k: v for row in rows for k, v in row.refuses.items()}),
        no_divergence=next((row.no_divergence for row in rows if row.no_divergence), ""),
        update=_update_of(parts) if any(row.update for row in rows) else None,
        parts=parts,
    )


def _unscaled(row: Loss) -> bool:
    """Whether the size of the loss does not move with beta: two that do cannot share a weight."""
    return row.at_reference is not None and row.at_reference(1.0) == row.at_reference(2.0)


def _at_reference(parts: tuple[Part, ...]) -> Any:
    values = [(weight, row.at_reference) for weight, row in parts if row.at_reference]
    if len(values) < len(parts):
        return None
    return lambda beta: sum(weight * value(beta) for weight, value in values)


def _sum_of(parts: tuple[Part, ...]) -> Any:
    def total(scores: Any, *, beta: float, state: State | None = None, **keywords: Any) -> Tensor:
        losses = [
            weight * row(scores, beta=beta, state=_state_of(row, state), **_own(row, keywords))
            for weight, row in parts
        ]
        return sum(losses[1:], losses[0])

    return total


def _update_of(parts: tuple[Part, ...]) -> Any:
    def update(scores: Any, state: State, *, beta: float, **keywords: Any) -> dict[str, Tensor]:
        return {
            f"{row.name}/{name}": value
            for _, row in parts
            for name, value in row.next_state(
                scores, _state_of(row, state), beta=beta, **_own(row, keywords)
            ).items()
        }

    return update


def _own(row: Loss, keywords: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in keywords.items() if name in row.keywords}


def _state_of(row: Loss, state: State | None) -> dict[str, Tensor]:
    """The part's entries of the sum's state, which carry its name in front."""
    prefix = f"{row.name}/"
    entries = (state or {}).items()
    return {k.removeprefix(prefix): value for k, value in entries if k.startswith(prefix)}
