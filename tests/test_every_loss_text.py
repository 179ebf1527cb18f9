"""Every loss but those of images trains the text wing, by its name alone."""

from __future__ import annotations

from typing import Any

import pytest

from alignkit.losses import GROUP_LOSSES, LOSSES, UNPAIRED_LOSSES
from tests.builders import pair_rows, tiny_lm, tiny_tokenizer
from tests.every_loss import columns_of, trains

NAMES = [name for name, row in LOSSES.items() if "text" in row.modalities]


def group_rows(num: int) -> list[dict[str, Any]]:
    """Rankings of two to four answers, some of them tied."""
    rows = []
    for i, row in enumerate(pair_rows(num)):
        answers = [row["chosen"], row["rejected"]]
        for k in range(i % 3):
            answers.append([{"role": "assistant", "content": f"Tea {k}, and water."}])
        ranking = [0, 1, 1, 2][: len(answers)]
        rows.append({"prompt": row["prompt"], "responses": answers, "ranking": ranking})
    return rows


def single_rows(num: int) -> list[dict[str, Any]]:
    """As many good answers as bad ones."""
    rows = []
    for i, row in enumerate(pair_rows(num)):
        side = "chosen" if i % 2 else "rejected"
        rows.append({"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"})
    return rows


def rows_for(name: str, num: int = 8) -> list[dict[str, Any]]:
    if name in GROUP_LOSSES:
        return group_rows(num)
    if name in UNPAIRED_LOSSES:
        return single_rows(num)
    return [row | columns_of(LOSSES[name]) for row in pair_rows(num)]


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_trains_the_text_wing(name) -> None:
    trains(name, (tiny_lm("llama"), tiny_tokenizer()), rows_for(name))
