"""`evaluate()` of language models: numbers against plain transformers, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from alignkit import DPO, GenerationOptions, LoRA, TextOptions, TrainerOptions, align, evaluate
from alignkit.api import sample
from alignkit.errors import ConfigError, DataError
from alignkit.statistics import win_rate
from alignkit.trained import source_of
from tests.builders import pair_rows, text_wing, tiny_lm, tiny_tokenizer
from tests.test_report import Page

PROMPTS = ["What is the colour of the sky?", "Name an animal.", "<script>alert('x')</script>"]
SHORT = GenerationOptions(max_new_tokens=12)


def length(prompts: Any, responses: Any, rows: Any) -> list[float | None]:
    """A reward that likes long answers and has no score for one prompt."""
    asked = zip(prompts, responses, strict=True)
    return [None if p == PROMPTS[1] else float(len(r)) for p, r in asked]


def first(prompts: Any, a: Any, b: Any, rows: Any) -> list[float]:
    """A judge that likes whatever stands first."""
    return [1.0] * len(prompts)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, a LoRA run on it, and an untrained adapter on it."""
    root = tmp_path_factory.mktemp("evaluate")
    model, tokenizer = tiny_lm("llama"), tiny_tokenizer()
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    result = align(
        str(root / "base"),
        DPO(),
        pair_rows(8),
        adapter=LoRA(rank=4),
        generation=SHORT,
        trainer=TrainerOptions(max_steps=4, batch_size=4, learning_rate=3e-2, precision="fp32"),
        run_dir=root / "run",
    )
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(root / "blank")
    tokenizer.save_pretrained(root / "blank")
    assert source_of(result) == source_of(root / "run")
    return {name: root / name for name in ("base", "run", "blank")}


@pytest.fixture(scope="module")
def found(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("out")
    given: dict[str, Any] = {"data": pair_rows(12)[8:], "prompts": PROMPTS, "reward": length}
    return evaluate(folders["run"], **given, judge=first, out=out / "page", sheet=out / "sheet")


def logps(model: Any, prompt: Any, answer: Any) -> float:
    ids = torch.tensor(np.concatenate([prompt, answer]).astype(np.int64))[None]
    with torch.no_grad():
        scores = model(ids).logits[0].double().log_softmax(-1)
    places = range(len(prompt), ids.shape[1])
    return float(sum(scores[place - 1, ids[0, place]] for place in places))


def test_pairs_are_scored_as_transformers_scores_them(folders: Any, found: Any) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders["base"]).eval()
    examples = text_wing().examples(pair_rows(12)[8:], TextOptions(), kind="pairs", seed=0)
    before = [[logps(base, r.prompt, a) for a in r.answers] for r in examples.rows]
    aligned = PeftModel.from_pretrained(base, folders["run"] / "model").eval()
    after = [[logps(aligned, r.prompt, a) for a in r.answers] for r in examples.rows]
    ratio = np.array(after) - np.array(before)  # (pairs, chosen and rejected)
    metrics = found.metrics
    assert metrics["accuracy"] == np.mean(ratio[:, 0] > ratio[:, 1])
    assert metrics["margin"] == pytest.approx((ratio[:, 0] - ratio[:, 1]).mean(), rel=1e-4)
    assert metrics["log_ratio/chosen"] == pytest.approx(ratio[:, 0].mean(), rel=1e-3, abs=1e-5)
    assert metrics["log_ratio/rejected"] == pytest.approx(ratio[:, 1].mean(), rel=1e-3, abs=1e-5)


def test_both_sides_answer_from_one_seed(folders: Any, found: Any) -> None:
    answers = found.answers
    assert answers.after == sample(folders["run"], PROMPTS)
    assert answers.before == sample(folders["base"], PROMPTS, SHORT)
    assert answers.before != answers.after
    scores = [length(PROMPTS, side, None) for side in (answers.before, answers.after)]
    rate = win_rate(*scores)
    row = found.measures["win_rate"]
    assert (row.value, row.num, row.missing) == (rate.value, 2, 1)
    assert next(iter(found.measures)) == "win_rate"


def test_a_judge_of_places_is_seen_through(found: Any) -> None:
    assert found.metrics["win_rate/judge"] == 0.5
    assert found.metrics["judge_flips"] == 1.0


def test_text_has_lengths_a_kl_and_fluency(folders: Any, found: Any) -> None:
    assert found.metrics["kl"] > -1 and found.measures["kl"].unit == "nats"
    assert 1 <= found.metrics["length/tokens_median"] <= 12
    assert 0 <= found.metrics["length/cut"] <= 1
    assert {"fluency", "length/tokens_p95"} <= set(found.measures)


def test_what_is_written(found: Any) -> None:
    told = json.loads((found.folder / "evaluation.json").read_text())
    assert told["measures"]["accuracy"]["value"] == found.metrics["accuracy"]
    assert told["against"].endswith("base") and told["settings"]["confidence"] == 0.95
    lines = [json.loads(one) for one in (found.folder / "answers.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    assert lines[1]["length before"] is None and lines[0]["length after"] is not None
    page = Page(found.page)  # every tag is closed
    assert not {"script", "a", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert PROMPTS[2] in page.text and "win rate over the opponent, by length" in page.text
    assert found.answers.after[0][:10].strip() in page.text
    sheet = Page(found.folder.parent / "sheet" / "index.html")
    assert "script" not in {tag for tag, _ in sheet.tags} and PROMPTS[2] in sheet.text
    assert (found.folder.parent / "sheet" / "key.json").is_file()
    assert "held-out accuracy" in str(found)


def test_the_model_that_nobody_trained_is_no_better(folders: Any) -> None:
    """A fresh adapter changes nothing: ties, zeros, and no KL."""
    given = evaluate(
        folders["blank"],
        data=pair_rows(4),
        prompts=PROMPTS[:2],
        reward=lambda p, r, rows: [len(one) for one in r],
        generation=SHORT,
    )
    metrics = given.metrics
    assert given.answers.before == given.answers.after
    for name, value in {
        "accuracy": 0.5,
        "margin": 0,
        "win_rate": 0.5,
        "kl": 0,
        "fluency": 0,
    }.items():
        assert metrics[name] == value, name
    assert metrics["win_rate_at_equal_length"] == 0.5
    assert given.measures["accuracy"].verdict == "no clear change"


def test_an_opponent_by_name_is_the_adapter_switched_off(folders: Any, found: Any) -> None:
    again = evaluate(folders["run"] / "model", against=folders["base"], data=pair_rows(12)[8:])
    for name in ("accuracy", "margin", "log_ratio/chosen"):
        assert again.metrics[name] == pytest.approx(found.metrics[name], rel=1e-4, abs=1e-6)
    other = evaluate(folders["base"], against=folders["run"], data=pair_rows(12)[8:])
    assert other.metrics["margin"] == pytest.approx(-found.metrics["margin"], rel=1e-4)


def test_alone_a_model_has_scores_only(folders: Any) -> None:
    alone = evaluate(
        folders["base"],
        prompts=PROMPTS[:2],
        num_prompts=1,
        reward=lambda p, r, rows: [2.0] * len(r),
        generation=SHORT,
    )
    assert alone.against is None and alone.metrics["score"] == 2.0
    assert len(alone.answers.after) == 1 and "win_rate" not in alone.measures


class Parrot:
    """An opponent that is no model: it repeats the prompt."""

    def sample(self, prompts: Any, options: Any, *, seed: int) -> list[str]:
        return [f"{prompt}!" for prompt in prompts]


def test_whatever_answers_can_be_the_opponent(folders: Any) -> None:
    given: dict[str, Any] = {"against": Parrot(), "prompts": PROMPTS[:2], "generation": SHORT}
    found = evaluate(folders["base"], reward=lambda p, r, rows: [len(one) for one in r], **given)
    assert found.answers.before == [f"{prompt}!" for prompt in PROMPTS[:2]]
    assert found.against == "Parrot" and "kl" not in found.measures
    assert found.measures["score"].before == np.mean([len(p) + 1 for p in PROMPTS[:2]])
    assert found.measures["length/tokens_median"].before is None
    with pytest.raises(ConfigError, match="Parrot answers prompts and has no likelihoods"):
        evaluate(folders["base"], data=pair_rows(2), **given)


def test_models_in_hand_come_back_as_they_were() -> None:
    model, tokenizer = tiny_lm("llama").train(), tiny_tokenizer()
    other = tiny_lm("llama", seed=1)
    flags = [p.requires_grad for p in other.parameters()]
    found = evaluate((model, tokenizer), against=(other, tokenizer), data=pair_rows(4))
    assert math.isfinite(found.metrics["margin"]) and found.metrics["margin"] != 0
    assert model.training and [p.requires_grad for p in other.parameters()] == flags


def test_other_tokens_cannot_be_compared_by_likelihood() -> None:
    mine = (tiny_lm("llama"), tiny_tokenizer())
    other = tiny_tokenizer()
    other.add_tokens(["harbour"])
    theirs = (tiny_lm("llama", seed=1), other)
    with pytest.raises(ConfigError, match="different tokenizers"):
        evaluate(mine, against=theirs, data=pair_rows(2))
    found = evaluate(mine, against=theirs, prompts=PROMPTS[:2], generation=SHORT)
    assert "kl" not in found.measures and "different tokenizers" in found.warnings[0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "needs held-out pairs"),
        ({"reward": length}, "need prompts that both sides answer"),
        ({"data": pair_rows(2)}, "Give against, such as the base"),
        ({"prompts": PROMPTS, "judge": first}, "judge compares"),
        ({"prompts": PROMPTS, "sheet": "x"}, "sheet compares"),
        ({"prompts": PROMPTS, "against": "self"}, "compared with another one"),
        ({"prompts": PROMPTS, "edit": (0.5,)}, "edit is for diffusion pipelines"),
        ({"prompts": PROMPTS, "data_options": TextOptions()}, "changes nothing without data"),
        ({"data": [], "against": "none", "num_prompts": 3}, "Give against"),
        ({"prompts": PROMPTS, "confidence": 95}, "confidence is the coverage"),
        ({"prompts": PROMPTS, "num_prompts": 0}, "num_prompts"),
        ({"prompts": PROMPTS, "reward": "no_such_module_here:f"}, "cannot be imported"),
    ],
)
def test_silly_combinations_are_refused_before_anything_is_loaded(
    given: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is loaded")

    monkeypatch.setattr("alignkit.evaluation.call.load", never)
    (tmp_path / "config.json").write_text("{}")
    if given.get("against") == "self":
        given = {**given, "against": str(tmp_path)}
    with pytest.raises((ConfigError, DataError), match=words):
        evaluate(str(tmp_path), **given)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="holds other files"):
        evaluate(str(tmp_path), prompts=PROMPTS, out=tmp_path / "out")
