"""Columns of the data that a method cannot do without, or has no use for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignkit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from alignkit.labels import Labels
    from alignkit.losses import Loss, SupervisedLoss
    from alignkit.objectives.criterion import OwnLoss

COLUMNS = {
    "p_chosen": "p_chosen",
    "target_margin": "margin",
    "score_chosen": "score_chosen",
    "score_rejected": "score_rejected",
}
"""Field of the scores -> the column that it comes from."""


def check_labels(loss: Loss | OwnLoss | SupervisedLoss, labels: Labels) -> None:
    """Look at what the rows say beside their answers, where the loss is particular about it.

    A column that speaks of pairs is refused on other kinds of rows where they are read
    (`alignkit.labels`).

    Raises:
        ConfigError: for a column that has no meaning for the loss.
        DataError: for a row without a column that the loss needs.
    """
    refused = dict(getattr(loss, "refuses", {}))
    needed = [name for name in loss.needs if name in COLUMNS]
    if not (refused or needed):
        return
    for number, label in zip(labels.rows, labels.labels, strict=True):
        given = {*label.numbers, *(("score_chosen", "score_rejected") if label.score else ())}
        for name in given & refused.keys():
            raise ConfigError(
                f"Loss {loss.name!r} does not take the column {COLUMNS.get(name, name)!r}: "
                f"{refused[name]}; row {number} (counted from 0) has one. Leave the column out, or "
                "take a loss such as 'sigmoid'."
            )
        for name in needed:
            if name not in given:
                raise DataError(
                    f"Loss {loss.name!r} needs the column {COLUMNS[name]!r}, and row {number} "
                    "(counted from 0) has none. Add it, rename one with data_options.columns, or "
                    "take a loss such as 'sigmoid'."
                )
