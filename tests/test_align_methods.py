"""Methods through `align()`: what the run folder says of them, and that it runs again."""

from __future__ import annotations

from typing import Any

import pytest

from alignkit import DPO, KTO, CheckpointError, GenerationOptions, TrainerOptions, align
from alignkit.config import from_file
from tests.builders import pair_rows, tiny_lm, tiny_tokenizer
from tests.test_every_loss_text import group_rows, single_rows

TRAINER = TrainerOptions(max_steps=2, batch_size=4, learning_rate=1e-3, log_every=1)
METHODS: dict[str, tuple[Any, Any, tuple[str, ...], tuple[str, ...]]] = {
    "pairs": (
        DPO({"sigmoid": 0.8, "hinge": 0.2}, weighting="wpo", ld_alpha=0.5, anchor=0.1),
        pair_rows,
        ("0.8 sigmoid + 0.2 hinge", "ld", "anchor", "wpo"),
        ("2305.18290", "2305.10425", "2411.10442", "2406.11827", "2409.06411", "2404.19733"),
    ),
    "rankings": (
        DPO("plackett_luce", divergence="js_divergence"),
        group_rows,
        ("plackett_luce", "js_divergence"),
        ("2305.18290", "2309.16240"),
    ),
    "singles": (
        KTO(undesirable_weight=1.25),
        single_rows,
        ("kto", "1.25", "liked: 1 - s(b (r - z))"),
        ("2402.01306",),
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_says_what_it_optimised(name, tmp_path) -> None:
    method, rows, words, papers = METHODS[name]
    model, tokenizer = tiny_lm("llama"), tiny_tokenizer()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    arguments: dict[str, Any] = {
        "trainer": TRAINER,
        "eval_data": rows(3),
        "generation": GenerationOptions(max_new_tokens=2),
        "run_dir": tmp_path / "run",
    }
    result = align(str(tmp_path / "base"), method, rows(8), **arguments)
    assert result.metrics["eval/loss"] > 0 and "eval/rewards/chosen" in result.metrics
    report = result.report.read_text()
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    for word in words:
        assert word in report and word in card, word
    for paper in papers:
        assert paper in report and paper in card, paper
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text().replace("<in memory: list of 8 rows>", "rows.jsonl")
    again = tmp_path / "again.yaml"
    again.write_text(text.replace("<in memory: list of 3 rows>", "rows.jsonl"))
    assert from_file(again).method == method
    changed = DPO() if isinstance(method, KTO) else KTO()
    with pytest.raises(CheckpointError, match=r"method\.name.* changed"):
        align(str(tmp_path / "base"), changed, rows(8), **arguments)
