"""`align()` on text, from rows to a folder that others can load."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit import (
    DPO,
    EarlyStop,
    GenerationOptions,
    LoRA,
    TextOptions,
    TrainerOptions,
    align,
    build,
)
from alignkit.errors import ConfigError
from alignkit.losses import PairScores
from tests.builders import pair_rows, text_wing, tiny_lm, tiny_tokenizer

SHORT = GenerationOptions(max_new_tokens=4)
PROMPTS = ["What is the sky?", "Name an animal that lives in the old forest.", "Tea?"]


def options(**more: Any) -> TrainerOptions:
    return TrainerOptions(**{"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2, **more})


def policy(architecture: str = "llama", **more: Any) -> tuple[Any, Any]:
    return tiny_lm(architecture, **more), tiny_tokenizer()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 24)[None]).logits


@pytest.fixture(scope="module", params=["full", "lora"])
def finished(request: Any, tmp_path_factory: Any) -> tuple[Any, Path]:
    """A finished run and the folder of its base."""
    root = tmp_path_factory.mktemp(request.param)
    model, tokenizer = policy("qwen2")
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    result = align(
        str(root / "base"),
        DPO(beta=0.2),
        pair_rows(12),
        eval_data=pair_rows(4),
        adapter=LoRA(rank=4) if request.param == "lora" else None,
        trainer=options(save_every=2, sample_every=2, log_every=1),
        generation=SHORT,
        run_dir=root / "run",
    )
    return result, root


def test_the_run_folder_holds_what_was_promised(finished) -> None:
    result, root = finished
    run = root / "run"
    assert result.run_dir == run and result.report == run / "report.html"
    for name in ("config.yaml", "metrics.jsonl", "result.json", "report.html", "model/README.md"):
        assert (run / name).stat().st_size > 0, name
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert list((run / "samples").iterdir())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history and [line["step"] for line in lines] == [1, 2, 3]
    assert {"loss", "grad_norm", "learning_rate", "rewards/margins"} <= lines[0].keys()
    assert result.metrics["eval/loss"] > 0 and 0 <= result.metrics["eval/rewards/accuracies"] <= 1


def test_the_model_folder_loads_and_computes_the_same(finished) -> None:
    result, root = finished
    folder = root / "run" / "model"
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(root / "base")
        loaded: Any = PeftModel.from_pretrained(base, folder)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded), logits(result.model))
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    assert not torch.allclose(logits(loaded), logits(base), atol=1e-4)
    text = "the sky over the old harbour"
    tokens = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert tokens == result.tokenizer(text)["input_ids"]


def test_training_learns_the_preferences() -> None:
    result = align(
        policy(),
        DPO(beta=0.1),
        pair_rows(8),
        adapter=LoRA(rank=8),
        trainer=options(max_steps=12, batch_size=8, schedule="constant"),
    )
    assert result.metrics["rewards/accuracies"] > 0.9 and result.history[-1]["loss"] < 0.6
    assert result.run_dir is None and result.report is None


@pytest.mark.parametrize(
    ("mode", "adapter", "checkpointing"),
    [
        (True, None, True),
        (False, None, False),
        (True, LoRA(rank=4), False),
        (False, LoRA(rank=4), True),
    ],
)
def test_nothing_of_the_callers_changes_but_the_weights(
    mode, adapter, checkpointing, tmp_path
) -> None:
    model, tokenizer = policy("gpt2", dropout=0.1)
    model.train(mode)
    before = facts_of(model, tokenizer)
    align(
        (model, tokenizer),
        DPO(),
        pair_rows(4),
        adapter=adapter,
        trainer=options(max_steps=1, gradient_checkpointing=checkpointing),
        generation=SHORT,
        run_dir=tmp_path,
    )
    assert facts_of(model, tokenizer) == before
    assert {m.training for m in model.modules()} == {mode}


def facts_of(model: Any, tokenizer: Any) -> dict[str, Any]:
    facts = {
        "config": model.config.to_dict(),
        "generation config": model.generation_config.to_dict(),
        "tokenizer": json.loads(tokenizer.backend_tokenizer.to_str()),
        "special tokens": tokenizer.special_tokens_map,
        "sides": (tokenizer.padding_side, tokenizer.truncation_side),
        "template": tokenizer.chat_template,
        "length": (len(tokenizer), tokenizer.model_max_length),
        "state": {k: v for k, v in vars(tokenizer).items() if isinstance(v, (str, int, bool))},
        "checkpointing": [getattr(m, "gradient_checkpointing", None) for m in model.modules()][:1],
    }
    return copy.deepcopy(facts)


# ---- sampling


@pytest.fixture(scope="module")
def sampler() -> Any:
    """A result whose model was handed over in train mode, with dropout in its config."""
    model, tokenizer = policy("gpt2", dropout=0.3)
    model.train()
    return align((model, tokenizer), DPO(), pair_rows(4), trainer=options(max_steps=1))


def test_answers_repeat_by_seed(sampler) -> None:
    first = sampler.sample(PROMPTS, max_new_tokens=12)
    assert first == sampler.sample(PROMPTS, max_new_tokens=12)
    assert first != sampler.sample(PROMPTS, max_new_tokens=12, seed=1)
    assert sampler.model.training, "the mode it was handed over in"


def test_an_answer_does_not_depend_on_its_neighbours(sampler) -> None:
    together = sampler.sample(PROMPTS, max_new_tokens=12)
    for num in (1, 2):
        assert sampler.sample(PROMPTS[:num], max_new_tokens=12) == together[:num]
    other = [PROMPTS[0], "a much longer question " * 5, PROMPTS[2]]
    found = sampler.sample(other, max_new_tokens=12)
    assert (found[0], found[2]) == (together[0], together[2])


def test_the_same_prompt_twice_gives_two_answers(sampler) -> None:
    first, second = sampler.sample([PROMPTS[0]] * 2, max_new_tokens=12)
    assert first != second


def test_temperature_0_takes_the_most_likely_token(sampler) -> None:
    first = sampler.sample(PROMPTS, max_new_tokens=6, temperature=0.0)
    assert first == sampler.sample(PROMPTS, max_new_tokens=6, temperature=0.0, seed=9)
    assert first == sampler.sample(PROMPTS, max_new_tokens=6, top_k=1, seed=5)


def test_a_bare_string_is_one_prompt_and_messages_are_taken(sampler) -> None:
    (one,) = sampler.sample(PROMPTS[0], max_new_tokens=6)
    messages = [{"role": "user", "content": PROMPTS[0]}]
    assert sampler.sample([messages], max_new_tokens=6) == [one]


def test_sampling_follows_the_models_distribution() -> None:
    """First tokens of many answers against the softmax, within four standard errors."""
    import numpy as np

    from alignkit.text.generation import generate

    model, tokenizer = policy()
    model.eval()
    num, prompt = 2000, np.array([5, 6, 7], dtype=np.int32)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(prompt)[None].long()).logits[0, -1].softmax(-1)
    one_token = GenerationOptions(max_new_tokens=1)
    keys = [(0, place) for place in range(num)]
    found = generate(model, tokenizer, [prompt] * num, one_token, keys, [3])
    share = (
        torch.bincount(torch.tensor([one.ids[0] for one in found]), minlength=len(expected)) / num
    )
    error = (expected * (1 - expected) / num).sqrt()
    assert ((share - expected).abs() <= 4.5 * error + 1e-9).all()


# ---- the loop in the open


def test_a_loop_may_be_left_and_finished(tmp_path) -> None:
    run = build(policy(), DPO(), pair_rows(8), trainer=options(max_steps=9), generation=SHORT,
                run_dir=tmp_path)  # fmt: skip
    for record in run.steps():
        if record.step == 2:
            break
    result = run.finish()
    assert [line["step"] for line in result.history] == [1, 2]
    assert run.finish() is result
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(result.model))


def test_steps_are_epochs_unless_told_otherwise() -> None:
    result = align(policy(), DPO(), pair_rows(10), trainer=options(max_steps=None))
    assert len(result.history) == 3  # 10 rows in batches of 4: one epoch


def test_held_out_sets_are_measured_when_due() -> None:
    result = align(
        policy(),
        DPO(),
        pair_rows(8),
        eval_data={"easy": pair_rows(4), "hard": pair_rows(6)},
        trainer=options(max_steps=4, eval_every=2),
    )
    due = [line["step"] for line in result.history if "eval/easy/loss" in line]
    assert due == [2, 4] and "eval/hard/rewards/margins" in result.metrics


def test_early_stop_and_the_best_checkpoint(tmp_path) -> None:
    result = align(
        policy(),
        DPO(),
        pair_rows(8),
        # The held-out pairs prefer the opposite: it gets worse from the first step on.
        eval_data=[
            {**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pair_rows(8)
        ],
        trainer=options(
            max_steps=20,
            eval_every=1,
            save_every=1,
            keep_checkpoints=1,
            keep_best="eval/loss",
            early_stop=EarlyStop(metric="eval/rewards/margins", patience=3),
        ),
        generation=SHORT,
        run_dir=tmp_path,
    )
    assert len(result.history) == 4  # the first was the best, three were worse
    losses = [line["eval/loss"] for line in result.history]
    assert losses == sorted(losses)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-000001", "step-000004"]


def test_a_yaml_file_is_the_same_call(tmp_path) -> None:
    model, tokenizer = policy()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = pair_rows(8)
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "run.yaml").write_text(
        f"policy: {tmp_path}/base\nmethod: {{name: dpo, beta: 0.3}}\ndata: {tmp_path}/pairs.jsonl\n"
        "adapter: {rank: 4}\ntrainer: {max_steps: 2, batch_size: 4, learning_rate: 0.01}\n"
    )
    from_file = align(str(tmp_path / "run.yaml"))
    direct = align(
        str(tmp_path / "base"),
        DPO(beta=0.3),
        rows,
        adapter=LoRA(rank=4),
        trainer=options(max_steps=2),
    )

    def plain(history: list[dict[str, float]]) -> list[dict[str, float]]:
        return [{k: v for k, v in line.items() if k != "seconds"} for line in history]

    assert plain(from_file.history) == plain(direct.history)


def test_a_loss_of_ones_own_through_align() -> None:
    def squared(scores: PairScores, *, beta: float, goal: float = 1.0) -> torch.Tensor:
        return (beta * scores.margin - goal) ** 2

    result = align(policy(), DPO(squared, beta=0.5, goal=2.0), pair_rows(8), trainer=options())
    assert result.history[0]["loss"] == 4.0 > result.history[-1]["loss"]


def test_p_chosen_and_margin_and_weight_columns_are_honoured() -> None:
    def first(**column: float) -> dict[str, float]:
        rows = [{**row, **column} for row in pair_rows(4)]
        return align(policy(), DPO(), rows, trainer=options(max_steps=2)).history

    plain = first()
    assert first(weight=3.0)[1]["loss"] == pytest.approx(plain[1]["loss"], rel=1e-6)
    assert first(p_chosen=0.5)[0]["grad_norm"] == pytest.approx(0, abs=1e-6)
    assert first(margin=0.5)[0]["loss"] == pytest.approx(0.9740770, abs=1e-6)


def test_rows_left_out_are_told(tmp_path) -> None:
    rows = pair_rows(6)
    rows[2] = {**rows[2], "rejected": rows[2]["chosen"]}
    run = build(policy(), DPO(), rows, data_options=TextOptions(max_length=512), trainer=options())
    assert run.facts["data"]["used"] == 5
    assert run.facts["data"]["skipped"] == {"chosen and rejected are the same": 1}


def test_a_model_that_an_adapter_was_laid_into_is_refused() -> None:
    model, tokenizer = policy()
    result = align((model, tokenizer), DPO(), pair_rows(4), adapter=LoRA(rank=2), trainer=options())
    for adapter in (None, LoRA(rank=2)):
        with pytest.raises(ConfigError, match="PeftModel"):
            build((model, tokenizer), DPO(), pair_rows(4), adapter=adapter, trainer=options())
    again = build((result.model, tokenizer), DPO(), pair_rows(4), trainer=options())
    assert again.wing.adapter == "continued"


def test_samples_are_followed_and_their_lengths_told(tmp_path) -> None:
    result = align(
        policy(),
        DPO(),
        pair_rows(8),
        trainer=options(max_steps=4, sample_every=2, log_every=1),
        generation=GenerationOptions(max_new_tokens=5),
        run_dir=tmp_path,
    )
    told = {line["step"]: line for line in result.history if "samples/cut" in line}
    assert sorted(told) == [2, 4]
    lines = (tmp_path / "samples/step-000004.jsonl").read_text().splitlines()
    rows = [json.loads(one) for one in lines]
    tokens = sorted(row["tokens"] for row in rows)
    assert all(1 <= n <= 5 for n in tokens) and told[4]["samples/tokens_max"] == tokens[-1]
    assert told[4]["samples/cut"] == sum(row["cut"] for row in rows) / len(rows)
    for row in rows:  # an answer is cut only where it used up its limit
        assert row["tokens"] == 5 or not row["cut"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("before training") >= 2 + len(rows), "table, lengths, and every course"
    assert "The same prompts through training" in page and "Length of samples in tokens" in page


def test_an_answer_is_cut_where_nothing_ended_it() -> None:
    wing = text_wing("llama")
    prompts = ["What is the colour of the sky?", "Name an animal."] * 6
    found = wing.sample_counted(prompts, GenerationOptions(max_new_tokens=100), seed=3)
    ended = [ids[-1] == wing.tokenizer.eos_token_id for ids in found.answer_ids]
    assert found.cut == [not one for one in ended] and any(ended) and not all(ended)
    assert found.answers == wing.sample(prompts, GenerationOptions(max_new_tokens=100), seed=3)
    # A stop string ends an answer, too, even in the last token that there is room for.
    first = wing.tokenizer.decode(found.answer_ids[0][:1])
    stopped = GenerationOptions(max_new_tokens=1, stop=(first,))
    assert wing.sample_counted(prompts[:1], stopped, seed=3).cut == [False]
    assert wing.sample_counted(prompts[:1], GenerationOptions(max_new_tokens=1), seed=3).cut
