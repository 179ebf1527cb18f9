"""The text half of the demo: a chat LLM aligned by DPO."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.api import build
from alignkit.demo.chat_world import known_reward, make_pairs, make_prompts
from alignkit.demo.measure import likelihoods, win_row
from alignkit.facts import EvaluationRow
from alignkit.methods import DPO
from alignkit.options import GenerationOptions, TextOptions, TrainerOptions
from alignkit.result import AlignResult
from alignkit.run import Run
from alignkit.statistics import mean, paired_difference

MODEL = Path(__file__).parent / "models" / "chat"


@dataclass(frozen=True)
class TextDemo:
    """How much the text half does."""

    pairs: int = 6400
    steps: int = 100
    prompts: int = 300
    learning_rate: float = 2e-4


def run_text(folder: Path, size: TextDemo) -> tuple[AlignResult, list[EvaluationRow]]:
    """Align the shipped chat model; returns the result and what was measured."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for split, num in (("train", size.pairs), ("heldout", 64)):
        rows = make_pairs(num, seed=0, split=split)  # type: ignore[arg-type]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{split}.jsonl").write_text(text, encoding="utf-8")
    generation = GenerationOptions(max_new_tokens=80, temperature=0.7)
    run = build(
        str(MODEL),
        DPO(beta=0.1),
        str(data / "train.jsonl"),
        eval_data=str(data / "heldout.jsonl"),
        generation=generation,
        trainer=TrainerOptions(
            max_steps=size.steps,
            batch_size=64,
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
    # The KL is an expectation over the policy itself, so its answers are drawn at temperature 1.
    own = result.sample(asked, seed=2, temperature=1.0)
    return result, [
        win_row(prompts, before, after, known_reward),
        _kl(run, asked, own),
        _fluency(run, asked, before, after),
    ]


def _kl(run: Run, asked: list[Any], answers: list[str]) -> EvaluationRow:
    """KL to the reference: the mean log-ratio over the policy's own answers."""
    found = likelihoods(run, _pairs(asked, answers, answers), _KEEP_ALL)
    return EvaluationRow.of(
        "KL to the reference, per answer",
        mean(found.chosen[:, 0]),
        unit="nats",
        better=None,
        note="mean log-ratio on the aligned model's own answers at temperature 1",
    )


def _fluency(run: Run, asked: list[Any], before: list[str], after: list[str]) -> EvaluationRow:
    """The second measure: how likely the base model finds the answers, which no pair speaks of."""
    found = likelihoods(run, _pairs(asked, after, before), _KEEP_ALL)
    return EvaluationRow.of(
        "fluency under the base model, per token",
        paired_difference(found.own[1][:, 0], found.own[0][:, 0]),
        unit="nats",
        note="change of the base's log-prob of the answers; no pair speaks of it",
    )


_KEEP_ALL = TextOptions(identical_pairs="keep", on_bad_row="skip")


def _pairs(asked: list[Any], chosen: list[str], rejected: list[str]) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, "chosen": one, "rejected": other}
        for prompt, one, other in zip(asked, chosen, rejected, strict=True)
    ]
