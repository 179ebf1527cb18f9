"""What losses carry from step to step is saved with a run, and resumes to the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignkit import DPO, KTO, TrainerOptions, build
from tests.builders import pair_rows, tiny_lm, tiny_tokenizer
from tests.test_every_loss_text import single_rows

METHODS: dict[str, tuple[Any, Any]] = {
    "pairs": (DPO({"aot": 1.0, "beta_dpo": 0.5}), pair_rows),
    "singles": (KTO("bco"), single_rows),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_stateful_loss_resumes_bit_exactly(name, tmp_path) -> None:
    method, rows = METHODS[name]
    trainer = TrainerOptions(
        max_steps=4, batch_size=5, micro_batch=2, learning_rate=1e-2, save_every=1, log_every=1
    )

    def play(folder: str, steps: int) -> Any:
        policy = (tiny_lm("llama"), tiny_tokenizer())
        run = build(policy, method, rows(8), trainer=trainer, run_dir=tmp_path / folder)
        for record in run.steps():
            if record.step == steps:
                break
        run.folder.unlock()
        return run

    whole = play("whole", 4)
    play("stopped", 2)
    resumed = play("stopped", 4)
    lines = [[line | {"seconds": 0} for line in run.history] for run in (whole, resumed)]
    assert lines[0] == lines[1] and len(lines[0]) == 4
    states = [run.trainer.objective.state for run in (whole, resumed)]
    assert states[0].keys() == states[1].keys() and states[0]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    for parameter, tensor in whole.trainer.parameters.items():
        assert torch.equal(tensor, resumed.trainer.parameters[parameter]), parameter
