"""The recipes of the documentation run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import alignkit
from alignkit import DPO, GenerationOptions, TrainerOptions
from tests.builders import pair_rows, tiny_lm, tiny_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "training-loop.md"
BLOCKS = [
    block
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    if "align_rounds(" not in block  # tests/test_rounds.py runs rounds
]


def namespace(folder: Path) -> dict[str, Any]:
    """The names that the recipes take for granted."""
    policy, short = (tiny_lm("llama"), tiny_tokenizer()), GenerationOptions(max_new_tokens=2)
    run = alignkit.build(
        policy,
        DPO(),
        pair_rows(8),
        trainer=TrainerOptions(max_steps=3, batch_size=4, schedule="constant", warmup=0),
        generation=short,
        run_dir=folder / "run",
    )
    names = {
        "alignkit": alignkit,
        "DPO": DPO,
        "policy": policy,
        "data": pair_rows(4),
        "short": short,
    }
    return names | {"run": run, "prompts": ["tea?", "sky?"], "my_score": lambda prompt, answer: 1.0}


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_recipe_runs(block: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    names = namespace(tmp_path)
    code = block.replace("% 100 == 0", "% 1 == 0").replace("max_new_tokens=64", "max_new_tokens=2")
    exec(code.replace('"runs/mine"', '"runs/mine", generation=short'), names)
    if "build(" in block:
        assert len(names["run"].history) == 1  # four rows in one batch, one epoch
    else:
        assert [line["step"] for line in names["run"].history] == [1, 2, 3]
    if "learning_rate" in block:
        rates = [line["learning_rate"] for line in names["run"].history]
        assert rates == [1e-6, 1e-5, 1e-5]


def test_there_are_recipes() -> None:
    assert len(BLOCKS) >= 4
