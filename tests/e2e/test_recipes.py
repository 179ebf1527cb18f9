"""The recipes of the documentation run as they stand there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import alignkit
from alignkit import DPO, GenerationOptions, TrainerOptions
from tests.builders import pair_rows, tiny_lm, tiny_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "training-loop.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
SHORT = GenerationOptions(max_new_tokens=2)


def write_files() -> None:
    """The files that the recipes name, in the working directory."""
    for part in (tiny_lm("llama"), tiny_tokenizer()):
        part.save_pretrained("runs/sft/model")
    prompts = [{"prompt": f"{word}?"} for word in ("tea", "sky", "fox", "river")]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))


def names() -> dict[str, Any]:
    """The names that the recipes take for granted."""
    policy = tiny_lm("llama"), tiny_tokenizer()
    options = TrainerOptions(max_steps=3, batch_size=4, schedule="constant", warmup=0)
    run = alignkit.build(policy, DPO(), pair_rows(8), trainer=options)
    return {
        "alignkit": alignkit,
        "DPO": DPO,
        "short": SHORT,
        "policy": policy,
        "data": pair_rows(4),
        "run": run,
        "prompts": ["tea?", "sky?"],
        "my_score": lambda prompt, answer: 1.0,
        "my_reward": lambda prompts, responses, rows: [float(len(r)) for r in responses],
    }


def shortened(block: str) -> str:
    """The same with small numbers, so that everything in it happens, and soon."""
    for old, new in (
        ("% 100 == 0", "% 1 == 0"),
        ("max_new_tokens=64", "max_new_tokens=2"),
        ("rounds=3", "rounds=2"),
        ('run_dir="', 'generation=short, run_dir="'),
    ):
        block = block.replace(old, new)
    return block


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_recipe_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files()
    given = names()
    exec(shortened(block), given)
    if "run.steps()" not in block:
        assert given["result"].history
        return
    steps = 1 if "build(" in block else 3  # four rows in one batch, one epoch
    assert [line["step"] for line in given["run"].history] == list(range(1, steps + 1))
    if "learning_rate" in block:
        rates = [line["learning_rate"] for line in given["run"].history]
        assert rates == [1e-6, 1e-5, 1e-5]


def test_there_are_recipes() -> None:
    assert len(BLOCKS) >= 5
