"""The loss tables as text: for the command `alignkit losses` and for docs/formulas.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignkit.losses import (
    GROUP_LOSSES,
    LOSSES,
    PREFERENCE_LOSSES,
    REWARD_LOSSES,
    SUPERVISED_LOSSES,
    UNPAIRED_LOSSES,
    RewardLoss,
    SupervisedLoss,
)
from alignkit.losses.table import Loss

COLUMNS = ("name", "equation", "paper", "needs", "minimiser", "golden", "defaults", "options")


AnyLoss = Loss | SupervisedLoss | RewardLoss
TABLES: Mapping[str, Mapping[str, Any]] = {
    "Pairs": PREFERENCE_LOSSES,
    "Rankings": GROUP_LOSSES,
    "Single labelled answers": UNPAIRED_LOSSES,
    "Demonstrations": SUPERVISED_LOSSES,
    "Reward models": REWARD_LOSSES,
}
"""Kind of data -> its losses."""


def cells(loss: AnyLoss) -> dict[str, str]:
    """What a listing says of a loss, by column."""
    if isinstance(loss, SupervisedLoss):
        return {
            "name": loss.name,
            "equation": loss.equation,
            "paper": loss.paper,
            "needs": "no reference" if loss.additive else "no reference, tokens",
            "minimiser": loss.minimiser,
            "golden": f"{loss.golden:.7f}",
            "defaults": "none",
            "options": "none",
        }
    if isinstance(loss, RewardLoss):
        return {
            "name": loss.name,
            "equation": loss.equation,
            "paper": loss.paper,
            "needs": f"{' or '.join(loss.rows)}, no reference",
            "minimiser": loss.first.minimiser,
            "golden": f"{loss.golden:.7f}",
            "defaults": "none",
            "options": "those of RewardModel",
        }
    assert loss.golden is not None
    return {
        "name": loss.name,
        "equation": loss.equation,
        "paper": loss.paper,
        "needs": ", ".join(_needs(loss)) or "nothing more",
        "minimiser": loss.minimiser,
        "golden": f"{loss.golden.value:.7f} at b = {loss.golden.beta:g}",
        "defaults": ", ".join(
            f"{wing}: beta={values['beta']:g}" for wing, values in loss.defaults.items()
        ),
        "options": ", ".join(f"{key}={value!r}" for key, value in loss.keywords.items()) or "none",
    }


def entry(loss: AnyLoss) -> str:
    """A loss in a few lines, for terminals."""
    shown = cells(loss)
    if isinstance(loss, Loss):
        shown |= _origins(loss)
    name, *rest = shown.items()
    return "\n".join([name[1], *(f"  {column:10} {value}" for column, value in rest)])


def _origins(loss: Loss) -> dict[str, str]:
    sources = "\n".join(f"{wing}: {beta.source}" for wing, beta in loss.betas.items())
    laws = ", ".join(sorted(loss.laws))
    return {"beta from": sources.replace("\n", "\n             "), "laws": laws}


def _needs(loss: Loss) -> list[str]:
    """What a row needs beyond log-likelihoods of policy and reference in any unit."""
    facts = {
        "no reference": not loss.needs_reference,
        "the global batch": loss.coupled,
        "a state": loss.update is not None,
        "nats": not loss.scale_free and "text" in loss.modalities,
        "images": loss.modalities == ("image",),
    }
    return [*(fact for fact, holds in facts.items() if holds), *loss.needs]


def markdown() -> str:
    """The tables for docs/formulas.md, one line per row, and where the default betas come from."""
    parts = [f"### {title}\n\n{_markdown_table(losses)}\n" for title, losses in TABLES.items()]
    return "\n".join([*parts, f"### Default betas\n\n{_beta_table()}\n"])


def _beta_table() -> str:
    """Wing and beta by source, with the losses that have it."""
    users: dict[tuple[str, str, str], list[str]] = {}
    for loss in LOSSES.values():
        for wing, beta in loss.betas.items():
            users.setdefault((wing, f"{beta.value:g}", beta.source), []).append(f"`{loss.name}`")
    lines = ["| wing | beta | source | losses |", "|---|---|---|---|"]
    for (wing, value, source), names in sorted(users.items(), reverse=True):
        lines.append(f"| {wing} | {value} | {source} | {' '.join(names)} |")
    return "\n".join(lines)


def _markdown_table(losses: Mapping[str, Any]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for loss in losses.values():
        shown = cells(loss) | {"name": f"`{loss.name}`"}
        row = [shown[name].replace("|", "\\|") for name in COLUMNS]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)
