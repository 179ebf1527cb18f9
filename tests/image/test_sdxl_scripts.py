"""The scripts about SDXL's cost, run small: every step of theirs, none of their figures."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(autouse=True)
def _importable() -> Iterator[None]:
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.mark.slow
def test_the_benchmark_against_the_recipe() -> None:
    import bench_sdxl_dpo as bench
    from reduced_sdxl import QUICK
    from sdxl_arm import Contestant

    class Idle:
        """In the place of the contestants that are measured alone, which do nothing new."""

        def ask(self, _: str) -> dict[str, float]:
            return {"mib": 1.0}

        def end(self) -> None: ...

    def start(name: str, folder: Path, keep: bool) -> Any:
        return Contestant(name, folder, QUICK) if keep else Idle()

    found = bench.measure(1, start)
    rows = {row["arm"]: row for row in bench.rows(found)}
    assert set(rows) == set(bench.ARMS)
    assert all(loss == pytest.approx(0.693147, abs=2e-5) for loss in found["first_loss"].values())
    # The same function on the same draws; and little enough to round by.
    assert (
        bench.logit_gap(found) < 1e-4 and max(map(abs, found["logits"]["recipe"]["exact"])) > 1e-2
    )
    assert all(value < 2e-3 for value in bench.rounding(found).values())
    assert rows["recipe"]["work"] == 1.0
    assert rows["bank"]["gflop"] < rows["plain"]["gflop"] < rows["checkpointed"]["gflop"]
    assert rows["checkpointed"]["gflop"] < rows["recipe"]["gflop"]
    slow = found | {"seconds": {name: [1.0] for name in bench.ARMS}}
    assert any("bank: speed 1.00 < 2.0" in missed for missed in bench.misses(slow))
    bench.show(found)


def test_the_reduced_model_keeps_the_proportions() -> None:
    from reduced_sdxl import REDUCED, TRUE_PROPORTIONS, proportions

    found = proportions(REDUCED)
    for part, share in TRUE_PROPORTIONS.items():
        assert found[part] / found["unet"] == pytest.approx(share, abs=0.01)


@pytest.mark.slow
def test_the_benchmark_of_the_cache(tmp_path: Path) -> None:
    import bench_image_cache as bench

    quick = Namespace(quick=True, device="cpu")
    (building,) = bench.build(tmp_path / "build", quick)
    (reading,) = bench.read(tmp_path / "read", quick)
    assert re.match(r"share \d+\.\d% of the VAE alone", building) and "pairs/s" in reading


@pytest.mark.slow
def test_the_check_of_the_true_unet_on_a_tiny_one() -> None:
    import check_real_sdxl as check

    found: dict[str, Any] = check.check("tiny")
    assert check.misses(found | {"peak GB": 1.0}, "tiny") == []
    assert check.misses(found | {"peak GB": 21.0}, "tiny") == ["below 20 GB"]
    assert check.SIZES["full"].widths == (320, 640, 1280)
