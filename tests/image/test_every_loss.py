"""Every loss that means something in the unit of images trains the image wing; the others do so
with the ELBO in nats.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignkit import DPO
from alignkit.criteria import criterion_of
from alignkit.losses import GROUP_LOSSES, LOSSES, UNPAIRED_LOSSES, PairScores
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


@pytest.mark.parametrize("name", [n for n in NAMES if LOSSES[n].size(2.0) != 1.0])
def test_a_loss_that_falls_with_beta_trains_like_sigmoid(name) -> None:
    """Of the size of sigmoid's gradient at the reference, and with its own minimum."""
    assert set(NAMES) >= {"ipo", "sppo", "sppo_hard"} and LOSSES[name].size(10.0) == 0.01

    def slope(loss: str, log_ratio: float) -> float:
        criterion = criterion_of(DPO(loss), "image")
        chosen = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1)
        scores = PairScores(
            chosen, -chosen.detach(), zero, zero, chosen_length=one, rejected_length=one
        )
        criterion(scores).sum().backward()
        return float(chosen.grad)

    assert 0.5 < slope(name, 0.0) / slope("sigmoid", 0.0) < 5
    # Certain labels: w - l = 1 / (2 beta) for IPO, w = 1 / (2 beta) for SPPO.
    least = 1 / (4 * 5000) if name == "ipo" else 1 / (2 * 5000)
    assert slope(name, least) == pytest.approx(0.0, abs=1e-6 * abs(slope(name, 0.0)))
    assert criterion_of(DPO(name), "text").scale == 1.0
