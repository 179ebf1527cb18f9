"""One run: the visible loop around the trainer, and what it leaves in the run folder."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from alignkit import checkpoint
from alignkit.atomic import atomic_folder
from alignkit.batches import StepRecord
from alignkit.cite import citations
from alignkit.config import RunConfig
from alignkit.facts import ReportFacts
from alignkit.model_card import model_card
from alignkit.options import GenerationOptions
from alignkit.protocols import Wing
from alignkit.report import write_report
from alignkit.run_folder import RunFolder
from alignkit.sources import RowSource
from alignkit.trainer import Trainer

log = logging.getLogger("alignkit")

NUM_SAMPLES = 8
"""Prompts answered for the report, before and after."""


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
            prompts: strings or message lists; a bare string is one prompt.
            generation: fields of `GenerationOptions` to change, and `seed`.
        """
        seed = generation.pop("seed", self.seed)
        one = [prompts] if isinstance(prompts, str) else list(prompts)
        return self.wing.sample(one, replace(self.generation, **generation), seed=seed)


class Run:
    """A built run. `steps()` is the training loop in the open; `finish()` gives the result.

    Made by `alignkit.build`. Stop early by leaving the loop; `finish()` then keeps what was
    reached.
    """

    def __init__(
        self,
        config: RunConfig,
        wing: Wing,
        trainer: Trainer,
        *,
        folder: RunFolder | None,
        eval_sources: Mapping[str, RowSource],
        prompts: Sequence[Any],
        facts: Mapping[str, Any],
        fingerprint: str,
    ) -> None:
        self.config = config
        self.wing = wing
        self.trainer = trainer
        self.runtime = trainer.runtime
        self.folder = folder
        self.eval_sources = eval_sources
        self.prompts = prompts
        self.facts = facts
        self.fingerprint = fingerprint
        self.history: list[dict[str, float]] = []
        self.metrics: dict[str, float] = {}
        self.seconds = 0.0
        self.evaluations: dict[str, Any] = {"best": None, "best_step": None, "waited": 0}
        self._result: AlignResult | None = None

    @property
    def writes(self) -> bool:
        """Whether this process writes the run folder."""
        return self.folder is not None and self.runtime.is_main

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = checkpoint.load(path)
        if state["fingerprint"] != self.fingerprint:
            from alignkit.errors import CheckpointError

            raise CheckpointError(
                f"{path} was made by a run that began with other weights than the policy given now "
                "(a model in hand that has been trained already?). Give the policy as it was, or "
                'start anew with resume="never".'
            )
        self.trainer.load_state_dict(state["trainer"])
        self.seconds = state["seconds"]
        self.metrics = dict(state["metrics"])
        self.evaluations = dict(state["evaluations"])
        if self.writes:
            assert self.folder is not None
            self.folder.reopen()
            self.history = self.folder.cut_metrics(self.trainer.step)
        self.history = self.runtime.share(self.history)
        log.info("Resumed from %s.", path)

    def steps(self) -> Iterator[StepRecord]:
        """One record per optimizer step; evaluates, samples and saves when they are due."""
        with giving_back(self.folder):
            yield from self._steps()

    def _steps(self) -> Iterator[StepRecord]:
        options, started = self.config.trainer, time.perf_counter() - self.seconds
        if self._should_stop():  # resumed where it had stopped
            return
        if self.trainer.step == 0:
            self._sample(0)
        bar = tqdm(
            total=self.trainer.total_steps,
            initial=self.trainer.step,
            desc=self.config.method.name,
            unit="step",
            disable=not self.runtime.is_main,
        )
        with bar:
            for bare in self.trainer.steps():
                record = self._evaluate(bare) if _due(options.eval_every, bare.step) else bare
                self.seconds = time.perf_counter() - started
                self._record(record)
                if _due(options.sample_every, record.step):
                    self._sample(record.step)
                # Last, so that a run resumed from here lacks nothing of this step.
                due = _due(options.save_every, record.step) and self.trainer.source.at_boundary
                if due or self._is_best(record.step):
                    self.save()
                bar.update()
                bar.set_postfix(_shown(record, self.metrics), refresh=False)
                yield record
                if self._should_stop():
                    return

    def _record(self, record: StepRecord) -> None:
        line = record.as_dict()
        self.history.append(line)
        self.metrics.update({k: v for k, v in line.items() if k not in ("step", "seconds")})
        if self.writes:
            assert self.folder is not None
            self.folder.append_metrics(line)
        if record.metrics and self.config.trainer.trackers:
            values = {k: v for k, v in line.items() if k != "step"}
            self.runtime.accelerator.log(values, step=record.step)

    def _evaluate(self, record: StepRecord) -> StepRecord:
        """The record with held-out metrics of every set, and the bookkeeping of the best."""
        found: dict[str, float] = {}
        for name, source in self.eval_sources.items():
            prefix = f"eval/{name}/" if name else "eval/"
            values = self.trainer.evaluate(source.once())
            found.update({prefix + metric: value for metric, value in values.items()})
        self._keep_best(found, record.step)
        return replace(record, metrics={**record.metrics, **found})

    def _keep_best(self, found: Mapping[str, float], step: int) -> None:
        options = self.config.trainer
        stop = options.early_stop
        metric = stop.metric if stop else options.keep_best
        if metric is None:
            return
        if metric not in found:
            from alignkit.errors import ConfigError

            raise ConfigError(
                f"{metric!r} is no metric of the evaluation. Its metrics: "
                f"{', '.join(sorted(found))}."
            )
        lower_is_better = stop.mode == "min" if stop else metric.endswith("loss")
        value = -found[metric] if lower_is_better else found[metric]
        best = self.evaluations["best"]
        if best is None or value > best:
            self.evaluations = {"best": value, "best_step": step, "waited": 0}
        else:
            self.evaluations["waited"] += 1

    def _is_best(self, step: int) -> bool:
        """Whether `keep_best` wants this step's checkpoint."""
        return self.config.trainer.keep_best is not None and self.evaluations["best_step"] == step

    def _should_stop(self) -> bool:
        stop = self.config.trainer.early_stop
        return stop is not None and self.evaluations["waited"] >= stop.patience

    def save(self) -> None:
        """Write a checkpoint of this moment; all processes must call it."""
        if self.folder is None:
            return
        state = {
            "trainer": self.trainer.state_dict(),
            "fingerprint": self.fingerprint,
            "seconds": self.seconds,
            "metrics": self.metrics,
            "evaluations": self.evaluations,
        }
        if self.writes:
            root = self.folder.checkpoints
            checkpoint.save(checkpoint.folder_of(root, self.trainer.step), state)
            best = self.evaluations["best_step"] if self.config.trainer.keep_best else None
            spare = checkpoint.folder_of(root, best) if best else None
            checkpoint.prune(root, self.config.trainer.keep_checkpoints, spare)
        self.runtime.barrier()

    def _sample(self, step: int) -> None:
        """Answer the report's prompts. Sharded weights cannot: that needs all processes."""
        if self.folder is None or not self.prompts or self.runtime.sharding != "none":
            return
        if self.writes:
            answers = self.wing.sample(self.prompts, self.config.generation, seed=self.config.seed)
            texts = [self.wing.prompt_text(prompt) for prompt in self.prompts]
            self.folder.write_samples(step, texts, answers)
        self.runtime.barrier()

    def finish(self) -> AlignResult:
        """Save the model, write the report, and return the result."""
        if self._result is None:
            with giving_back(self.folder):
                self._result = self._finish()
        return self._result

    def _finish(self) -> AlignResult:
        if self.eval_sources and not any(k.startswith("eval/") for k in self.metrics):
            for name, source in self.eval_sources.items():
                prefix = f"eval/{name}/" if name else "eval/"
                values = self.trainer.evaluate(source.once())
                self.metrics.update({prefix + k: v for k, v in values.items()})
        self._sample(self.trainer.step)
        report = self._write_results()
        self.wing.release()
        if self.config.trainer.trackers:
            self.runtime.accelerator.end_training()
        return AlignResult(
            model=self.wing.policy,
            tokenizer=self.wing.tokenizer,
            run_dir=None if self.folder is None else self.folder.path,
            history=self.history,
            metrics=self.metrics,
            report=report,
            wing=self.wing,
            generation=self.config.generation,
            seed=self.config.seed,
        )

    def _write_results(self) -> Path | None:
        weights = self._full_weights()
        if self.folder is None:
            return None
        report = self.folder.report_file
        if self.writes:
            facts = self._report_facts()
            base = self.config.policy if isinstance(self.config.policy, (str, Path)) else None
            with atomic_folder(self.folder.model_dir) as temporary:
                self.wing.save(temporary, base=None if base is None else str(base), weights=weights)
                card = model_card(
                    facts,
                    base=None if base is None else str(base),
                    modality=self.wing.modality,
                    files=sorted(p.name for p in temporary.iterdir()),
                )
                (temporary / "README.md").write_text(card, encoding="utf-8")
            report = write_report(self.folder, facts)
            self.folder.write_result(
                {
                    "facts": facts.as_dict(),
                    "metrics": {k: v for k, v in self.metrics.items() if math.isfinite(v)},
                    "steps": self.trainer.step,
                }
            )
            self._push_to_hub()
            self.folder.unlock()
        self.runtime.barrier()
        return report

    def _push_to_hub(self) -> None:
        name = self.config.trainer.push_to_hub
        if name is not None:
            from huggingface_hub import HfApi

            assert self.folder is not None
            api = HfApi()
            api.create_repo(name, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=self.folder.model_dir)

    def _full_weights(self) -> dict[str, Tensor] | None:
        """The policy's weights gathered from their shards; None where they are whole already."""
        if self.runtime.sharding == "none":
            return None
        state = self.wing.policy.state_dict(keep_vars=True)
        # Tied weights stay one tensor, so that they are written once.
        distinct = {id(value): value for value in state.values()}
        whole = {key: self.runtime.whole(value.detach()) for key, value in distinct.items()}
        return {name: whole[id(value)] for name, value in state.items()}

    def _report_facts(self) -> ReportFacts:
        loss = self.config.method.loss
        return ReportFacts(
            **self.facts,
            citations=citations(
                self.config.method.name,
                loss if isinstance(loss, str) else None,
                self.wing.modality,
                None if self.config.adapter is None else self.config.adapter.kind,
            ),
            seconds=self.seconds,
            peak_memory_bytes=self.runtime.peak_memory(),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            run_dir=str(self.folder.path) if self.folder else "",
        )


@contextmanager
def giving_back(folder: RunFolder | None) -> Iterator[None]:
    """Unlock the run folder if what is done inside fails, so that it can be tried again.

    The folder would free itself at its end, but a kept traceback (a notebook's) puts that off.
    """
    try:
        yield
    except GeneratorExit:  # the caller left the loop, and may finish
        raise
    except BaseException:
        if folder is not None:
            folder.unlock()
        raise


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _shown(record: StepRecord, metrics: Mapping[str, float]) -> dict[str, str]:
    shown = {"loss": f"{record.loss:.4f}"}
    if "rewards/accuracies" in metrics:
        shown["accuracy"] = f"{metrics['rewards/accuracies']:.2f}"
        shown["margin"] = f"{metrics['rewards/margins']:.3g}"
    return shown
