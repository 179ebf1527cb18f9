"""Every loss that means something in the unit of images trains the image wing; the others do so
with the ELBO in nats.
"""

from __future__ import annotations

from typing import Any

import pytest

from alignkit.losses import GROUP_LOSSES, LOSSES, UNPAIRED_LOSSES
from tests.every_loss import columns_of, trains
from tests.image.conftest import make_pipeline, picture

PROMPTS = ("a red circle", "a blue square")
NAMES = [n for n, row in LOSSES.items() if row.scale_free or row.modalities == ("image",)]


def rows_for(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i, prompt in enumerate(PROMPTS):
        row: dict[str, Any] = {"prompt": prompt}
        if name in GROUP_LOSSES:
            row |= {"images": [picture(9 * i + k) for k in range(2 + i % 2)]}
            row |= {"ranking": [0, 1, 2][: len(row["images"])]}
        elif name in UNPAIRED_LOSSES:
            row |= {"image": picture(i), "label": i % 2 == 0}
        else:
            row |= {"chosen": picture(2 * i), "rejected": picture(2 * i + 1)}
            row |= columns_of(LOSSES[name])
        rows.append(row)
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_every_scale_free_loss_trains_the_image_wing(name) -> None:
    trains(name, make_pipeline(), rows_for(name))
