"""Running moments against numpy on everything at once, however it came."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.running import RunningMoments, clip_scores
from tests.processes import Processes, in_processes

STREAM = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4


def taken(*batches: torch.Tensor) -> RunningMoments:
    found = RunningMoments()
    for batch in batches:
        found.update(batch)
    return found


def test_batches_add_up_to_the_whole() -> None:
    found = taken(STREAM[:1], STREAM[1:8], STREAM[8:8], STREAM[8:])
    assert found.count == 40
    assert found.mean == pytest.approx(STREAM.mean().item(), abs=1e-9)
    assert found.variance == pytest.approx(np.var(STREAM.numpy()), rel=1e-9)
    white = found.normalise(STREAM)
    assert white.mean().item() == pytest.approx(0, abs=1e-8)
    assert white.std(correction=0).item() == pytest.approx(1)
    scaled = found.normalise(STREAM, shift_mean=False)
    assert torch.allclose(scaled, STREAM / found.std)


def test_two_processes_have_the_moments_of_one() -> None:
    def half(processes: Processes) -> RunningMoments:
        found = RunningMoments()
        for batch in STREAM.view(4, 10):
            found.update(batch[processes.rank * 3 : 3 if processes.rank == 0 else None], processes)
        return found

    first, second = in_processes(2, half)
    assert first.state_dict() == second.state_dict()
    whole = taken(*STREAM.view(4, 10))
    assert first.mean == pytest.approx(whole.mean) and first.std == pytest.approx(whole.std)


def test_missing_scores_are_left_out() -> None:
    with_gaps = torch.tensor([1.0, float("nan"), 3.0])
    assert taken(with_gaps).state_dict() == taken(torch.tensor([1.0, 3.0])).state_dict()


def test_states_come_back_and_go_on() -> None:
    whole, part = taken(STREAM[:20], STREAM[20:]), RunningMoments()
    part.load_state_dict(taken(STREAM[:20]).state_dict())
    part.update(STREAM[20:])
    assert part.state_dict() == whole.state_dict()


def test_little_has_no_scale() -> None:
    one = taken(torch.tensor([5.0]))
    assert one.normalise(torch.tensor([7.0])).tolist() == [7.0]
    flat = taken(torch.full((8,), 5.0))
    assert flat.normalise(torch.tensor([5.0])).tolist() == [0.0]


def test_scores_are_held_and_counted() -> None:
    scores = torch.tensor([-12.0, 0.5, 10.0, 11.0])
    held, beyond = clip_scores(scores, 10.0)
    assert held.tolist() == [-10, 0.5, 10, 10] and beyond.tolist() == [1, 0, 0, 1]
    same, none = clip_scores(scores, None)
    assert torch.equal(same, scores) and not none.any()
    with pytest.raises(ConfigError, match="limit"):
        clip_scores(scores, 0.0)
