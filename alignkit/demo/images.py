"""The image half of the demo: an SDXL pipeline aligned by Diffusion-DPO."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alignkit.api import build
from alignkit.demo.measure import likelihoods, win_row
from alignkit.demo.scene_world import (
    attribute_score,
    known_reward,
    make_pairs,
    make_prompts,
    write_pairs,
)
from alignkit.facts import EvaluationRow
from alignkit.methods import DPO
from alignkit.options import GenerationOptions, LoRA, TrainerOptions
from alignkit.result import AlignResult
from alignkit.run import Run
from alignkit.statistics import mean, paired_difference

MODEL = Path(__file__).parent / "models" / "sdxl"


@dataclass(frozen=True)
class ImageDemo:
    """How much the image half does."""

    pairs: int = 1500
    steps: int = 450
    prompts: int = 128
    learning_rate: float = 1.5e-3
    beta: float = 2000.0


def run_images(folder: Path, size: ImageDemo) -> tuple[AlignResult, list[EvaluationRow]]:
    """Align the shipped pipeline; returns the result and what was measured."""
    data = folder / "data"
    for split, num in (("train", size.pairs), ("heldout", 64)):
        write_pairs(data / split, make_pairs(num, seed=0, split=split))  # type: ignore[arg-type]
    generation = GenerationOptions(steps=20, guidance_scale=3.0)
    run = build(
        str(MODEL),
        DPO(beta=size.beta),
        str(data / "train"),
        eval_data=str(data / "heldout"),
        adapter=LoRA(rank=16),
        generation=generation,
        trainer=TrainerOptions(
            max_steps=size.steps,
            batch_size=32,
            learning_rate=size.learning_rate,
            eval_every=max(1, size.steps // 4),
            log_every=10,
        ),
        run_dir=folder / "run",
        resume="never",
    )
    assert isinstance(run, Run)
    prompts = make_prompts(size.prompts, seed=1, split="heldout")
    asked = [prompt.text for prompt in prompts]
    before = run.wing.sample(asked, generation, seed=1)
    for _ in run.steps():
        pass
    result = run.finish()
    after = result.sample(asked, seed=1)
    follows = [
        [attribute_score(p, image) for p, image in zip(prompts, images, strict=True)]
        for images in (before, after)
    ]
    rows = [
        win_row(prompts, before, after, known_reward),
        EvaluationRow.of(
            "prompt-following of the other attributes",
            paired_difference(*follows),
            note="colours, kinds and background; no pair speaks of them",
        ),
    ]
    return result, rows + _drift(run, data / "heldout")


def _drift(run: Run, pairs: Path) -> list[EvaluationRow]:
    """Change of the denoising error on held-out pictures, preferred and other."""
    found = likelihoods(run, str(pairs), run.wing.default_options)
    return [
        EvaluationRow.of(
            f"denoising error of {side} pictures against the reference",
            # log-ratio = -1/2 (error of policy - error of reference)
            mean(-2 * values.mean(axis=1)),
            unit="per element",
            better=None,
            note="policy minus reference, held-out pairs",
        )
        for side, values in (("chosen", found.chosen), ("rejected", found.rejected))
    ]
