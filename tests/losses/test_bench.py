"""The benchmark of the losses runs, and no loss is out of all proportion."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from alignkit.losses import LOSSES

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_losses.py"


@pytest.mark.parametrize("name", LOSSES)
def test_4096_pairs_take_milliseconds(name) -> None:
    """The bar is 3 ms on an idle core; ten times that is a loss that grows like pairs squared."""
    spec = spec_from_file_location("bench_losses", SCRIPT)
    bench = module_from_spec(spec)
    spec.loader.exec_module(bench)
    assert 0 < bench.milliseconds(LOSSES[name], 4096, 3) < 30
