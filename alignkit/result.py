"""What a run gives back, just now or from its folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alignkit.batches import StepRecord
from alignkit.config import RunConfig
from alignkit.options import GenerationOptions
from alignkit.protocols import Wing
from alignkit.run_folder import RunFolder
from alignkit.schema import hints, refuse_unknown_keys, validate


@dataclass
class AlignResult:
    """What a run gives back.

    Attributes:
        model: the aligned PreTrainedModel, PeftModel or DiffusionPipeline.
        tokenizer: of a text policy; None for images.
        run_dir: the run folder, or None.
        history: one dict per optimizer step.
        metrics: the last value of every metric.
        report: path of report.html, or None.
    """

    model: Any
    tokenizer: Any
    run_dir: Path | None
    history: list[dict[str, float]]
    metrics: dict[str, float]
    report: Path | None
    wing: Wing = field(repr=False)
    generation: GenerationOptions = field(repr=False, default_factory=GenerationOptions)
    seed: int = 0

    def sample(self, prompts: Sequence[Any] | str, **generation: Any) -> list[Any]:
        """Answers of the aligned model: strings, or PIL images.

        Args:
            prompts: strings or message lists; a bare string, or one message list, is one prompt.
            generation: fields of `GenerationOptions` to change, and `seed`.
        """
        seed = generation.pop("seed", self.seed)
        refuse_unknown_keys("generation", generation, [*hints(GenerationOptions), "seed"])
        options = replace(self.generation, **generation)
        validate(options, "generation")
        single = isinstance(prompts, str) or (prompts and isinstance(prompts[0], Mapping))
        return self.wing.sample([prompts] if single else list(prompts), options, seed=seed)


class FinishedRun:
    """A run that had finished before: no step is left, and the result is read from its folder."""

    def __init__(self, config: RunConfig, wing: Wing, folder: RunFolder) -> None:
        self.config, self.wing, self.folder = config, wing, folder
        self.history = folder.read_metrics()

    def steps(self) -> Iterator[StepRecord]:
        """None."""
        return iter(())

    def abandon(self) -> None:
        """Give the folder back."""
        self.folder.unlock()

    def finish(self) -> AlignResult:
        """The result that the run left."""
        stored = self.folder.read_result() or {}
        self.folder.unlock()
        self.wing.release()
        return AlignResult(
            model=self.wing.policy,
            tokenizer=self.wing.tokenizer,
            run_dir=self.folder.path,
            history=self.history,
            metrics=stored.get("metrics", {}),
            report=self.folder.report_file,
            wing=self.wing,
            generation=self.config.generation,
            seed=self.config.seed,
        )
