"""The benchmarks of the text wing run, shortened and without a peer; their arithmetic holds."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
PEERLESS = {"bench_packing", "bench_bound", "bench_growth", "bench_overhead"}


@pytest.fixture
def script(monkeypatch: Any) -> Any:
    """Imports a script, or a module that the scripts share, by its name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.fixture(scope="module")
def work(tmp_path_factory: Any) -> Path:
    """One world for all of them."""
    return tmp_path_factory.mktemp("bench")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "bench_dpo",
        "bench_lora",
        "bench_kto",
        "bench_sft",
        "bench_packing",
        "bench_bound",
        "bench_growth",
        "bench_overhead",
        "bench_syncs",
        "bench_reference",
        "bench_reward",
        "bench_tokenise",
    ],
)
def test_a_benchmark_runs_without_a_peer(name, script, work, capsys) -> None:
    given = ["--quick", "--work", str(work), "--name", name]
    given += [] if name in PEERLESS else ["--no-peer"]
    assert script(name).main(given) == 0, capsys.readouterr().out
    told = json.loads((work / "results" / f"{name}.json").read_text())
    for one in told["contestants"].values():
        assert len(one["laps"]) >= 3
        assert all(lap["cpu"] > 0 for lap in one["laps"])
    if name == "bench_packing":
        prefix, none = (told["contestants"][layout]["laps"] for layout in ("prefix", "none"))
        for one, other in zip(prefix, none, strict=True):
            assert abs(one["loss"] - other["loss"]) < 1e-5
            assert one["positions"] < other["positions"]


def test_without_a_peer_to_run_it_says_how_to_make_one(script, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        script("bench_dpo").main(["--quick", "--work", str(tmp_path)])
    assert stopped.value.code == 2
    assert "trl==1.16.0" in capsys.readouterr().err


def test_a_ratio_is_that_of_medians_and_lies_in_its_interval(script) -> None:
    ratio = script("bench_text.figures").ratio
    exact = ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (exact.value, exact.low, exact.high) == (2.0, 2.0, 2.0)
    noisy = ratio([3.0, 5.0, 4.0, 4.0, 6.0], [2.0, 2.0, 2.0, 2.0, 2.0])
    assert noisy.value == 2.0 and 1.5 <= noisy.low < 2.0 < noisy.high <= 3.0


@pytest.mark.parametrize(("value", "at_most", "met"), [(2.0, False, True), (2.0, True, False)])
def test_a_bar_is_a_floor_or_a_ceiling(script, value, at_most, met) -> None:
    assert script("bench_text.figures").Bar("x", value, 1.0, at_most=at_most).met is met


def test_the_distance_from_a_line_is_relative(script) -> None:
    from_line = script("bench_growth").from_line
    x = np.array([1.0, 2.0, 4.0, 8.0])
    assert from_line(x, 0.5 + 3 * x) < 1e-12
    assert from_line(x, x**2) > 0.2


def test_reads_of_what_descends_from_parameters_are_counted(script) -> None:
    """Each of the ways to wait for the device once; the host's own tensors are free."""
    model = torch.nn.Linear(2, 2)
    own = torch.ones(2)
    with torch.no_grad(), script("bench_text.reads").Reads(model) as reads:
        out, part = model(own).sum(), torch.zeros(2)
        part[:1].add_(out)
        sent = own.to("cpu")
        assert not reads.found.total()
        float(out), out.tolist(), bool(out == out), float(part[1]), float(sent.sum())
        model.weight[torch.ones(2, dtype=torch.bool)]
        float(own.sum()), own.tolist(), own.nonzero()
    found = {name: num for name, num in reads.found.items() if num}
    assert found == {"aten._local_scalar_dense.default": 4, "tolist": 1, "aten.index.Tensor": 1}


def test_the_products_of_a_linear_layer_are_noted(script) -> None:
    """Forward 2 * 5 * 3 * 4 FLOPs, and as many for the gradient of the weight."""
    matmuls = script("bench_text.matmuls")
    layer = torch.nn.Linear(3, 4, bias=False)
    with matmuls.Matmuls() as noted:
        (layer(torch.ones(5, 3)) * torch.ones(5, 4)).sum().backward()
    assert matmuls.flops(noted.found) == 2 * (2 * 5 * 3 * 4)
    assert matmuls.replay(noted.found) >= 0
