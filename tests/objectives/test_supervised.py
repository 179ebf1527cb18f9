"""SFT from rows to the loss: against transformers' own loss, and whatever the split."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit import (
    DPO,
    SFT,
    GenerationOptions,
    LoRA,
    TextOptions,
    TrainerOptions,
    align,
    build,
)
from alignkit.batches import Batch
from alignkit.config import from_file
from alignkit.losses import SUPERVISED_LOSSES
from alignkit.objectives.supervised import SupervisedObjective
from alignkit.text.packing import LAYOUTS
from tests.builders import loss_and_gradients, pair_rows, text_wing, tiny_lm, tiny_tokenizer
from tests.losses.no_sync import NoSync

WEIGHTS = (1.0, 0.0, 2.0, 0.5)


def conversations(num: int = 8) -> list[dict[str, Any]]:
    """Two turns each, of uneven lengths; every fourth one has weight 0."""
    rows = []
    for i, row in enumerate(pair_rows(num)):
        more = [{"role": "user", "content": "And then?" * (i % 3 + 1)}, *row["rejected"]]
        messages = [*row["prompt"], *row["chosen"], *more]
        rows.append({"messages": messages, "weight": WEIGHTS[i % 4]})
    return rows


def global_batch(wing: Any, loss_on: str = "assistant") -> Batch:
    options = TextOptions()
    examples = wing.examples(conversations(), options, kind="supervised", seed=0, loss_on=loss_on)
    return examples.collate(range(8), [0] * 8)


def objective(wing: Any, name: str = "nll", budget: Any = "auto") -> SupervisedObjective:
    return SupervisedObjective(wing.backend, SUPERVISED_LOSSES[name], budget=budget)


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_one_row_is_transformers_own_loss(architecture) -> None:
    """`model(input_ids, labels=...).loss`, with -100 on what is not scored."""
    wing = text_wing(architecture)
    batch = global_batch(wing)
    for place in (0, 3):
        row = batch.select([place])
        prompt, completion = row.content.prompts[0], row.content.completions[0]
        ids = torch.tensor([[*prompt.tolist(), *completion.tolist()]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        assert row.content.scored is not None
        labels[:, len(prompt) :][:, ~torch.from_numpy(row.content.scored[0])] = -100
        theirs = wing.policy(input_ids=ids, labels=labels).loss.item()
        mine, _ = loss_and_gradients(objective(wing), row)
        assert mine == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("name", SUPERVISED_LOSSES)
def test_the_loss_is_the_definition_in_float64(name) -> None:
    """Token by token over the whole batch, weights included; one mean at the end."""
    wing = text_wing("llama")
    batch = global_batch(wing)
    found = wing.backend.module(batch, want=frozenset({"token_logps", "token_mask"}))
    total = count = 0.0
    for row in range(8):
        weight = WEIGHTS[row % 4]
        tokens = found.extras["token_logps"][row][found.extras["token_mask"][row]]
        for x in tokens.double().tolist():
            total += weight * (-x if name == "nll" else -math.exp(x) * x)
            count += weight
    mine, _ = loss_and_gradients(objective(wing, name), batch)
    assert mine == pytest.approx(total / count, rel=1e-6)
    assert float(objective(wing).normaliser(batch)) == count


@pytest.mark.parametrize("name", SUPERVISED_LOSSES)
def test_micro_batches_change_nothing(name) -> None:
    wing = text_wing("llama")
    batch = global_batch(wing)
    whole, gradients = loss_and_gradients(objective(wing, name, 8), batch)
    for budget in (1, 3):
        loss, others = loss_and_gradients(objective(wing, name, budget), batch)
        assert loss == pytest.approx(whole, rel=1e-6)
        for key, gradient in gradients.items():
            torch.testing.assert_close(others[key], gradient, rtol=1e-4, atol=1e-7)


def test_a_row_of_weight_2_is_a_row_twice() -> None:
    wing = text_wing("llama")
    examples = wing.examples(
        conversations(), TextOptions(), kind="supervised", seed=0, loss_on="assistant"
    )
    twice, once = (
        replace(examples.collate(rows, [0] * len(rows)), weight=torch.tensor(weights))
        for rows, weights in (([0, 3, 3, 5], [1.0] * 4), ([0, 3, 5], [1.0, 2.0, 1.0]))
    )
    twice, _ = loss_and_gradients(objective(wing), twice)
    assert loss_and_gradients(objective(wing), once)[0] == pytest.approx(twice, rel=1e-6)


def test_the_head_runs_on_scored_tokens_alone() -> None:
    wing, seen = text_wing("llama"), []
    wing.policy.get_output_embeddings().register_forward_hook(
        lambda module, inputs, logits: seen.append(logits[..., 0].numel())
    )
    batch = global_batch(wing).select([0, 2, 3])
    objective(wing)(objective(wing).micro_batches(batch, 1)[0])
    assert seen[-1] == sum(int(one.sum()) for one in batch.content.scored)
    assert seen[-1] < sum(map(len, batch.content.completions))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_no_row_s_tokens_move_another_s_likelihood(architecture, layout) -> None:
    """Packing without contamination: another first row, and the others stay as they are."""
    wing = text_wing(architecture)
    batch = global_batch(wing).select([0, 1, 2])
    content = replace(batch.content, layout=layout)
    other = replace(
        content,
        prompts=((content.prompts[0] + 7) % 300, *content.prompts[1:]),
        completions=((content.completions[0] + 11) % 300, *content.completions[1:]),
    )
    want = frozenset({"token_logps"})
    before, after = (
        wing.backend.module(replace(batch, content=one), want=want).extras["token_logps"]
        for one in (content, other)
    )
    torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=1e-6)
    assert (after[0] - before[0]).abs().max() > 1e-3


def test_evaluation_is_the_likelihood_whatever_is_trained() -> None:
    wing = text_wing("llama")
    batch = global_batch(wing).select([0, 2])
    measured = {}
    for name in SUPERVISED_LOSSES:
        made = objective(wing, name)
        pieces = [made.evaluate(micro) for micro in made.micro_batches(batch, 0)]
        measured[name] = {k: float(pieces[0][k][0] / pieces[0][k][1]) for k in pieces[0]}
        measured[name] |= made.derived(measured[name])
    assert measured["nll"] == measured["dft"]
    mine, _ = loss_and_gradients(objective(wing), batch)
    assert measured["nll"]["loss"] == pytest.approx(mine, rel=1e-6)
    assert measured["nll"]["perplexity"] == pytest.approx(math.exp(mine), rel=1e-5)
    hits = count = 0.0
    for place, weight in ((0, 1.0), (1, 2.0)):
        row = batch.select([place]).content
        ids = torch.tensor([[*row.prompts[0].tolist(), *row.completions[0].tolist()]])
        likeliest = wing.policy(input_ids=ids).logits[0, :-1].argmax(-1)
        begin = len(row.prompts[0])
        right = (likeliest == ids[0, 1:])[begin - 1 :][torch.from_numpy(row.scored[0])]
        hits, count = hits + weight * float(right.sum()), count + weight * len(right)
    assert measured["nll"]["token_accuracy"] == pytest.approx(hits / count)


@pytest.mark.parametrize("name", SUPERVISED_LOSSES)
def test_a_micro_batch_makes_nobody_wait_for_the_device(name) -> None:
    wing = text_wing("llama")
    made = objective(wing, name)
    (micro,) = made.micro_batches(global_batch(wing), 1)
    with NoSync():
        loss, _ = made(micro)
        loss.backward()
    with NoSync():
        made.evaluate(micro)


@pytest.mark.slow
def test_loss_falls_and_the_report_says_what_was_run(tmp_path) -> None:
    run = build(
        (tiny_lm("llama"), tiny_tokenizer()),
        SFT("dft", loss_on="assistant"),
        conversations(),
        eval_data=conversations(),
        trainer=TrainerOptions(
            max_steps=30, batch_size=8, learning_rate=1e-2, log_every=1, eval_every=10
        ),
        run_dir=tmp_path / "run",
    )
    for _ in run.steps():
        pass
    result = run.finish()
    found = [line["eval/loss"] for line in result.history if "eval/loss" in line]
    assert found[-1] < 0.7 * found[0] and len(found) == 3
    assert {"nll", "grad_norm"} <= result.history[0].keys()
    report = result.report.read_text(encoding="utf-8")
    assert "sg(e^x) x" in report and "2508.05629" in report and "log-ratio of policy" not in report


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, LoRA(rank=4)])
def test_two_stages(adapter, tmp_path) -> None:
    """DPO goes on from what SFT left, and compares with it."""
    for part in (tiny_lm("llama"), tiny_tokenizer()):
        part.save_pretrained(tmp_path / "base")
    trainer = TrainerOptions(max_steps=2, batch_size=4, learning_rate=1e-2, log_every=1)
    given = {"trainer": trainer, "generation": GenerationOptions(max_new_tokens=2)}
    first = align(
        str(tmp_path / "base"),
        SFT(loss_on="assistant"),
        conversations(),
        adapter=adapter,
        run_dir=tmp_path / "sft",
        **given,
    )
    left = {name: p.detach().clone() for name, p in first.model.named_parameters()}
    run = build(
        str(tmp_path / "sft" / "model"), DPO(), pair_rows(8), run_dir=tmp_path / "dpo", **given
    )
    for name, parameter in run.wing.policy.named_parameters():
        assert torch.equal(parameter, left[name]), name
    records = list(run.steps())
    assert (
        records[0].loss == pytest.approx(math.log(2)) and records[0].metrics["rewards/margins"] == 0
    )
    assert run.finish().report is not None


@pytest.mark.slow
def test_the_tiny_recipe_runs(tmp_path, monkeypatch) -> None:
    """On a file like the demo's, whose prompts and answers are messages."""
    monkeypatch.chdir(Path(__file__).parents[2])
    for name in ("train", "heldout"):
        lines = map(json.dumps, pair_rows(8))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    changed = [f"data={tmp_path}/train.jsonl", f"eval_data={tmp_path}/heldout.jsonl"]
    changed += ["trainer.max_steps=2", "trainer.batch_size=4", "generation.max_new_tokens=2"]
    changed += ["trainer.eval_every=2", f"run_dir={tmp_path}/run"]
    config = from_file("configs/tiny_text_sft.yaml", changed)
    result = align(**{f.name: getattr(config, f.name) for f in fields(config)})
    assert {"eval/loss", "eval/perplexity", "eval/token_accuracy"} <= result.metrics.keys()
    found = result.metrics["eval/perplexity"]
    assert found == pytest.approx(math.exp(result.metrics["eval/loss"]))
    assert result.history[0]["loss"] > result.history[1]["loss"] > 0
