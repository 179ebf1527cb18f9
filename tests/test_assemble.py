"""What is refused before weights are loaded, and what is told before training begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit import DPO, ConfigError, DataError, LoRA, TrainerOptions, align, build
from alignkit.runtime import Runtime
from tests.builders import pair_rows, table_objective, table_source, tiny_lm, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A policy's folder that says what it is, and would fail to load."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "model_index.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"data": "none.jsonl"}, DataError, "there is no file or folder 'none.jsonl'"),
        ({"data": Path("some/where/else")}, DataError, "no file or folder 'some/where/else'"),
        ({"eval_data": "./held_out"}, DataError, r"no file or folder '\./held_out'"),
        ({"eval_data": {"a": "none.csv"}}, DataError, "no file or folder 'none.csv'"),
        (
            {"adapter": LoRA(continue_from="./none")},
            ConfigError,
            r"adapter\.continue_from must exist; there is no folder '\./none'",
        ),
        ({"reference": "./none"}, ConfigError, r"reference must exist; there is no folder"),
        ({"reference": "images"}, ConfigError, "must be of the policy's modality, 'text'"),
        ({"reference": tiny_lm()}, ConfigError, r"reference=\(Qwen2ForCausalLM\(\.\.\.\), token"),
    ],
)
def test_what_leads_nowhere_is_refused_before_weights_are_loaded(
    given, kind, words, folder, monkeypatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("alignkit.text.wing.load", lambda *_, **__: pytest.fail("loaded"))
    rows = given.pop("data", pair_rows(2))
    with pytest.raises(kind, match=words):
        build(str(folder), DPO(), rows, **given)


def test_numbers_that_were_left_open_are_told(capsys) -> None:
    align(
        (tiny_lm(), tiny_tokenizer()),
        DPO(),
        pair_rows(4),
        trainer=TrainerOptions(max_steps=1, batch_size=4),
    )
    told = capsys.readouterr().err
    assert "beta 0.1, learning_rate 1e-06, reference frozen, steps 1, batch 4" in told


@pytest.mark.parametrize("shuffle", [True, False])
def test_rows_are_shuffled_unless_told_otherwise(shuffle) -> None:
    run = build(
        (tiny_lm(), tiny_tokenizer()),
        DPO(),
        pair_rows(12),
        trainer=TrainerOptions(max_steps=2, batch_size=12, shuffle=shuffle),
    )
    epochs = [batch.row_id.tolist() for batch, _ in zip(run.trainer.source, "ab", strict=False)]
    assert all(sorted(rows) == list(range(12)) for rows in epochs)
    assert [rows == list(range(12)) for rows in epochs] == [not shuffle] * 2


def test_fp16_scales_gradients_and_skips_what_overflows() -> None:
    """A scale is a power of 2, so that the same weights come out; an overflow moves nothing."""
    from alignkit.trainer import Trainer

    def trained(scale: float | None, beta: float = 0.1) -> Trainer:
        runtime = Runtime(precision="fp32")
        if scale is not None:
            runtime.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        options = TrainerOptions(max_steps=2, batch_size=4, learning_rate=0.1, log_every=1)
        source = table_source(8, batch_size=4)
        trainer = Trainer(table_objective(8, beta=beta), source, options, runtime=runtime)
        trainer.fit()
        return trainer

    def weights(trainer: Trainer) -> Any:
        return torch.cat([p.detach().flatten() for p in trainer.parameters.values()])

    plain, scaled = trained(None), trained(2.0**12)
    assert torch.equal(weights(plain), weights(scaled)) and scaled.skipped_steps == 0
    overflown = trained(2.0**126, beta=1e4)
    assert overflown.skipped_steps == 2
    start = table_objective(8, beta=1e4).backend.module.logps.detach()
    assert torch.equal(weights(overflown), start)
    assert isinstance(Runtime(precision="fp16").scaler, torch.amp.GradScaler)


def test_trackers_are_told_what_is_logged(tmp_path) -> None:
    """A tracker of the user's own, by the name that it was registered under."""
    from accelerate import tracking

    told: list[tuple[int, dict[str, float]]] = []

    class Notes(tracking.GeneralTracker):
        name = "notes"
        requires_logging_directory = False
        main_process_only = True

        def __init__(self, project: str, **_: Any) -> None:
            super().__init__()
            assert project == "alignkit"

        @property
        def tracker(self) -> None:
            return None

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            assert "'loss': 'sigmoid'" in values["run"]

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            assert step is not None
            told.append((step, values))

    given = TrainerOptions(
        max_steps=5, batch_size=2, log_every=2, eval_every=3, trackers=("notes",)
    )
    arguments: dict[str, Any] = {"eval_data": pair_rows(2), "trainer": given, "run_dir": tmp_path}
    policy = tiny_lm(), tiny_tokenizer()
    if not hasattr(tracking, "register_tracker_class"):
        pytest.skip("this accelerate registers no trackers")
    with pytest.raises(ConfigError, match="Unknown tracker 'notes'"):
        build(policy, DPO(), pair_rows(4), **arguments)
    tracking.register_tracker_class(Notes)
    try:
        result = align(policy, DPO(), pair_rows(10), **arguments)
    finally:
        del tracking.LOGGER_TYPE_TO_CLASS["notes"]
    assert [step for step, _ in told] == [1, 2, 3, 4, 5]
    for step, values in told:
        line = dict(result.history[step - 1])
        assert values == {k: v for k, v in line.items() if k != "step"}
    assert "eval/loss" in told[2][1] and "rewards/margins" not in told[2][1]
