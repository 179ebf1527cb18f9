"""Masked statistics: whitening against the definition, over processes as over one, and blind to
what stands in masked places."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alignkit.losses.masked import masked_mean, masked_sum, moments, whiten
from tests.processes import Processes, in_processes


def test_goldens_of_the_population() -> None:
    white = whiten(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert white.tolist() == pytest.approx([-1.3416408, -0.4472136, 0.4472136, 1.3416408])
    kept = whiten(torch.tensor([1.0, 2.0, 3.0, 4.0]), shift_mean=False)
    assert kept.tolist() == pytest.approx([1.1583592, 2.0527864, 2.9472136, 3.8416408])


def ragged() -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([3, 1, 5, 0, 2, 4])
    mask = torch.arange(5) < lengths.unsqueeze(1)
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 3 + 100, mask


def test_masked_whitening_by_numpy() -> None:
    values, mask = ragged()
    kept = values.double().numpy()[mask.numpy()]
    expected = (kept - kept.mean()) / kept.std()
    found = whiten(values, mask)
    np.testing.assert_allclose(found[mask].numpy(), expected, atol=1e-6)
    assert (found[~mask] == 0).all()
    assert masked_mean(values, mask).item() == pytest.approx(kept.mean())
    rows = [row[keep].sum().item() for row, keep in zip(values, mask, strict=True)]
    assert masked_sum(values, mask, -1).tolist() == pytest.approx(rows)
    assert masked_mean(values, mask, -1)[3] == 0, "a row of which nothing counts"


def test_defect_13_masked_positions_leak_into_statistics() -> None:
    """Defect 13 of rlhf systems: NaN times 0 is NaN."""
    values, mask = ragged()
    for garbage in (float("nan"), float("inf"), 1e30):
        filled = torch.where(mask, values, garbage).requires_grad_()
        assert torch.equal(whiten(filled, mask), whiten(values, mask))
        masked_mean(filled, mask).backward()
        assert filled.grad is not None
        expected = mask / mask.sum()
        assert torch.equal(filled.grad, expected)


def test_two_processes_whiten_as_one() -> None:
    """Never per process: the two halves have other means."""
    values, mask = ragged()
    whole = whiten(values, mask)

    def half(processes: Processes) -> torch.Tensor:
        mine = slice(0, 2) if processes.rank == 0 else slice(2, 6)
        found = moments(values[mine], mask[mine], processes)
        return whiten(values[mine], mask[mine], moments=found)

    halves = torch.cat(in_processes(2, half))
    assert torch.allclose(halves, whole, atol=1e-6)
    alone = torch.cat([whiten(values[:2], mask[:2]), whiten(values[2:], mask[2:])])
    assert not torch.allclose(alone, whole, atol=1e-2), "the test would notice whitening per rank"


def test_what_has_no_spread() -> None:
    assert whiten(torch.tensor([5.0])).tolist() == [5.0]
    assert whiten(torch.full((4,), 0.1)).tolist() == [0.0] * 4
    nothing = whiten(torch.tensor([7.0, 8.0]), torch.tensor([False, False]))
    assert nothing.tolist() == [0.0, 0.0]
