"""A run that was stopped goes on to the same bits, with what losses carry from step to step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignkit import DPO, KTO, SFT, LoRA, TrainerOptions, build
from tests.builders import pair_rows, tiny_lm, tiny_tokenizer
from tests.objectives.test_supervised import conversations
from tests.test_every_loss_text import single_rows

TURNS = SFT(loss_on="assistant", neftune_alpha=5.0)
RUNS: dict[str, dict[str, Any]] = {
    "pairs": {"method": DPO({"aot": 1.0, "beta_dpo": 0.5}), "data": pair_rows(8)},
    "singles": {"method": KTO("bco"), "data": single_rows(8)},
    "supervised": {"method": TURNS, "data": conversations()},
    "supervised adapter": {"method": TURNS, "data": conversations(), "adapter": LoRA(rank=4)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_goes_on_to_the_same_bits(name, tmp_path) -> None:
    trainer = TrainerOptions(
        max_steps=4, batch_size=5, micro_batch=2, learning_rate=1e-2, save_every=1, log_every=1
    )

    def play(folder: str, steps: int) -> Any:
        given = RUNS[name] | {"trainer": trainer, "run_dir": tmp_path / folder}
        run = build((tiny_lm("llama"), tiny_tokenizer()), **given)
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
    for parameter, tensor in whole.trainer.parameters.items():
        assert torch.equal(tensor, resumed.trainer.parameters[parameter]), parameter
    states = [getattr(run.trainer.objective, "state", {}) for run in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    assert bool(states[0]) == (not name.startswith("supervised"))
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
