"""The text half of the demo: a chat LLM aligned by DPO."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.api import build
from alignkit.demo.chat_world import known_reward, make_pairs, make_prompts
from alignkit.demo.measure import likelihoods, mean_row, win_row
from alignkit.evaluate import paired_difference
from alignkit.facts import EvaluationRow
from alignkit.methods import DPO
from alignkit.options import GenerationOptions, TextOptions, TrainerOptions
from alignkit.result import AlignResult
from alignkit.run import Run

MODEL = Path(__file__).parent / "models" / "chat"


@dataclass(frozen=True)
class TextDemo:
    """How much the text half does."""

    pairs: int = 1500
    steps: int = 50
    prompts: int = 300
    learning_rate: float = 3e-4


def run_text(folder: Path, size: TextDemo) -> tuple[AlignResult, list[EvaluationRow]]:
    """Align the shipped chat model; returns the result and what was measured."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for split, num in (("train", size.pairs), ("heldout", 64)):
        rows = make_pairs(num, seed=0, split=split)  # type: ignore[arg-type]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{split}.jsonl").write_text(text, encoding="utf-8")
    generation = GenerationOptions(max_new_tokens=80)
    run = build(
        str(MODEL),
        DPO(beta=0.1),
        str(data / "train.jsonl"),
        eval_data=str(data / "heldout.jsonl"),
        generation=generation,
        trainer=TrainerOptions(
            max_steps=size.steps,
            batch_size=32,
            learning_rate=size.learning_rate,
            eval_every=max(1, size.steps // 4),
            log_every=5,
        ),
        run_dir=folder / "run",
        resume="never",
    )
    assert isinstance(run, Run)
    prompts = make_prompts(size.prompts, seed=1, split="heldout")
    asked = [prompt.messages for prompt in prompts]
    before = run.wing.sample(asked, generation, seed=1)
    for _ in run.steps():
        pass
    result = run.finish()
    after = result.sample(asked, seed=1)
    wins = win_row(prompts, before, after, known_reward)
    return result, [wins, *_drift(run, asked, before, after)]


def _drift(run: Run, asked: list[Any], before: list[str], after: list[str]) -> list[EvaluationRow]:
    """KL to the reference on the policy's own answers, and their fluency under the base model."""
    pairs = [
        {"prompt": prompt, "chosen": new, "rejected": old}
        for prompt, new, old in zip(asked, after, before, strict=True)
    ]
    options = TextOptions(identical_pairs="keep", on_bad_row="skip")
    found = likelihoods(run, pairs, options)
    kl = mean_row(
        "KL to the reference, per answer",
        found["log_ratio_chosen"],
        unit="nats",
        note="mean log-ratio on the aligned model's own answers",
    )
    fluency = EvaluationRow.of(
        "fluency under the base model, per token",
        paired_difference(found["reference_rejected"], found["reference_chosen"]),
        unit="nats",
        note="change of the base's log-prob of the answers; no pair speaks of it",
    )
    return [kl, fluency]
