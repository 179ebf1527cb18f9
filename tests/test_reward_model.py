"""Reward models through `align()`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from alignkit import LoRA, Mixture, RewardModel, TextOptions, TrainerOptions, align, build
from alignkit.checks import check
from alignkit.config import RunConfig
from alignkit.errors import ConfigError, DataError
from tests.builders import pair_rows, tiny_lm, tiny_tokenizer

BRIEF = TrainerOptions(max_steps=6, batch_size=8, learning_rate=1e-2, log_every=1)


def model() -> tuple[Any, Any]:
    return tiny_lm(), tiny_tokenizer()


def rankings(num: int = 12) -> list[dict[str, Any]]:
    worst = [{"role": "assistant", "content": "no no no"}]
    return [
        {
            "prompt": row["prompt"],
            "responses": [row["rejected"], worst, row["chosen"]],
            "ranking": [1, 2, 0],
        }
        for row in pair_rows(num)
    ]


def ratings(num: int = 16) -> list[dict[str, Any]]:
    """Rated by how often the answer says "and grey"."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen"], "score": 10.0 + 4 * (i % 4)}
        for i, row in enumerate(pair_rows(num))
    ]


@pytest.mark.slow
def test_a_classifier_learns_pairs_and_loads_in_transformers(tmp_path: Path) -> None:
    rows = pair_rows(16)
    before = model()
    found = align(
        before,
        RewardModel(centering=0.01),
        rows,
        eval_data=rows[:6],
        trainer=BRIEF,
        run_dir=tmp_path / "run",
    )
    assert found.history[-1]["loss"] < 0.5 * found.history[0]["loss"]
    assert found.metrics["eval/rewards/accuracies"] == 1.0
    assert not any("logps" in name or "log_ratio" in name for name in found.metrics)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, found.model.state_dict()[name]), name
    for name, value in tiny_lm().state_dict().items():
        assert torch.equal(value, before[0].state_dict()[name]), "a policy in hand is left alone"
    again = align(
        (tiny_lm(), before[1]),
        RewardModel(centering=0.01),
        rows,
        eval_data=rows[:6],
        trainer=BRIEF,
        run_dir=tmp_path / "run",
    )
    assert again.metrics["loss"] == found.metrics["loss"], "a finished run is returned"


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce", "best_of_k"])
def test_rankings_need_no_other_option(loss: str) -> None:
    found = align(model(), RewardModel(loss=loss), rankings(), adapter=LoRA(rank=4), trainer=BRIEF)
    assert found.history[-1]["loss"] < 0.7 * found.history[0]["loss"]


def test_k_choose_2_is_the_pairwise_loss_over_all_pairs() -> None:
    """Through the model: K answers of a prompt, each scored once, against all pairs of them."""
    rows = rankings(4)
    apart = [
        {"prompt": row["prompt"], "chosen": row["responses"][i], "rejected": row["responses"][j]}
        for row in rows
        for i, j in ((2, 0), (2, 1), (0, 1))
    ]
    found = []
    for data, size in ((rows, 4), (apart, 12)):
        options = TrainerOptions(max_steps=1, batch_size=size, learning_rate=1e-3)
        run = build(model(), RewardModel(), data, trainer=options)
        (record,) = run.steps()
        found.append((record.loss, record.grad_norm))
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"per_token": True, "huber": 1.0}, {"loss": "ordinal", "levels": 4}]
)
def test_ratings_are_learned_in_their_own_unit(options: dict[str, Any]) -> None:
    rows = ratings()
    if options.get("levels"):
        rows = [{**row, "score": (row["score"] - 10) / 4} for row in rows]
    trainer = TrainerOptions(max_steps=40, batch_size=16, learning_rate=3e-3)
    method = RewardModel(kind="regression", **options)
    found = align(model(), method, rows, eval_data=rows, trainer=trainer)
    assert found.metrics["eval/ratings/r2"] > 0.5
    mean = sum(row["score"] for row in rows) / len(rows)
    assert abs(found.metrics["eval/rewards/mean"] - mean) < 0.2 * mean


@pytest.mark.slow
def test_a_pairwise_model_reads_both_answers() -> None:
    """Cycles, which no scorer can represent: each of three answers beats the next."""
    answers = ["Say one.", "Say two.", "Say three."]
    rows = [
        {"prompt": "Say what?", "chosen": answers[i], "rejected": answers[(i + 1) % 3]}
        for i in range(3)
    ] * 4
    trainer = TrainerOptions(max_steps=40, batch_size=12, learning_rate=5e-3)
    found = align(model(), RewardModel(kind="pairwise"), rows, eval_data=rows, trainer=trainer)
    assert found.metrics["eval/rewards/accuracies"] == 1.0
    assert found.metrics["eval/loss"] < 0.5, "below ln 2, the best of any Bradley-Terry scorer"


@pytest.mark.slow
def test_critiques_are_learned_with_their_verdicts(tmp_path: Path) -> None:
    rows = [
        {**row, "critique": "It is fine.", "verdict": 1 + i % 5} for i, row in enumerate(ratings(8))
    ]
    found = align(
        model(), RewardModel(kind="critique"), rows, trainer=BRIEF, run_dir=tmp_path / "run"
    )
    assert found.history[-1]["loss"] < found.history[0]["loss"]
    assert '"critique"' in (tmp_path / "run" / "model" / "reward_model.json").read_text()


def test_words_are_margins_by_llama_2s_tables() -> None:
    """The first step's loss of a head of equal scores is L(-m)."""
    rows = [{**row, "margin": "Slightly better"} for row in pair_rows(8)]
    losses = {}
    for margins in ("small", "large"):
        options = TextOptions(margins=margins)
        run = build(model(), RewardModel(), rows, data_options=options, trainer=BRIEF)
        with torch.no_grad():
            run.wing.policy.score.weight.zero_()
        losses[margins] = next(iter(run.steps())).loss
        run.abandon()
    expected = {"small": 1 / 3, "large": 1.0}
    for margins, m in expected.items():
        wanted = torch.nn.functional.softplus(torch.tensor(m)).item()
        assert losses[margins] == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(DataError, match="significantly better"):
        bad = [{**rows[0], "margin": "much better"}]
        build(model(), RewardModel(), bad, data_options=TextOptions(margins="small"))


def test_pretraining_on_weak_pairs_is_a_first_run_and_the_next_goes_on(tmp_path: Path) -> None:
    """PMP: head and trunk of the second phase begin bitwise where the first ended."""
    weak = align(model(), RewardModel(), pair_rows(8), trainer=BRIEF, run_dir=tmp_path / "pmp")
    run = build(str(tmp_path / "pmp" / "model"), RewardModel(), pair_rows(8), trainer=BRIEF)
    for name, value in weak.model.state_dict().items():
        assert torch.equal(run.wing.policy.state_dict()[name], value), name
    run.abandon()


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on_bit_for_bit(tmp_path: Path) -> None:
    trainer = TrainerOptions(max_steps=6, batch_size=4, learning_rate=1e-2, save_every=3)
    arguments: dict[str, Any] = {"trainer": trainer, "adapter": LoRA(rank=2)}
    method = RewardModel(kind="regression")
    whole = align(model(), method, ratings(), **arguments, run_dir=tmp_path / "whole")
    run = build(model(), method, ratings(), **arguments, run_dir=tmp_path / "run")
    for record in run.steps():
        if record.step == 4:
            break
    run.abandon()
    found = align(model(), method, ratings(), **arguments, run_dir=tmp_path / "run")
    assert [h["loss"] for h in found.history] == [h["loss"] for h in whole.history]
    for one, other in zip(found.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_how_the_batch_is_split_and_laid_out_changes_nothing() -> None:
    losses = []
    for micro, packing in ((8, "prefix"), (3, "varlen"), (1, "none")):
        options = TrainerOptions(max_steps=3, batch_size=8, micro_batch=micro, learning_rate=1e-3)
        found = align(
            model(),
            RewardModel(),
            rankings(),
            trainer=options,
            data_options=TextOptions(packing=packing),
        )
        losses.append([h["loss"] for h in found.history])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: RewardModel(kind="regression", centering=0.1), "centering is an option"),
    (lambda: RewardModel(kind="pairwise", loss="plackett_luce"), "trains reward models of kind"),
    (lambda: RewardModel(loss="nll"), "trains critics"),
    (lambda: RewardModel(kind="regression", loss="ordinal"), "levels"),
    (lambda: RewardModel(label_smoothing=0.7), "label_smoothing"),
    (lambda: RewardModel(loss="sigmoid"), "loss must be"),
    (lambda: RewardModel(levels=5), "levels is an option"),
]


@pytest.mark.parametrize(("method", "said"), REFUSED)
def test_what_does_not_go_together_is_refused(method: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(RunConfig("somewhere", method(), "pairs.jsonl"), "text")


def test_refused_around_it() -> None:
    for options, said in (
        ({"reference": "frozen"}, "no reference"),
        ({"trainer": TrainerOptions(sample_every=2)}, "sample_every"),
    ):
        with pytest.raises(ConfigError, match=said):
            check(RunConfig("somewhere", RewardModel(), "pairs.jsonl", **options), "text")
    with pytest.raises(ConfigError, match="'image'"):
        check(RunConfig("somewhere", RewardModel(), "pairs.jsonl"), "image")
    with pytest.raises(DataError, match="All ratings are 2"):
        same = [{**row, "score": 2.0} for row in ratings(4)]
        align(model(), RewardModel(kind="regression"), same, trainer=BRIEF)


def test_a_mixture_is_read_by_its_first_rows() -> None:
    sets = Mixture([(rankings(4), 1.0), (rankings(6), 1.0)])
    found = align(model(), RewardModel(), sets, trainer=BRIEF)
    assert found.history[-1]["loss"] < found.history[0]["loss"]
