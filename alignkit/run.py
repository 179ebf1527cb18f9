"""One run: the visible loop around the trainer, and what it leaves in the run folder."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignkit import checkpoint
from alignkit.average import Average
from alignkit.batches import StepRecord
from alignkit.best import BestSoFar
from alignkit.capabilities import counted_samples
from alignkit.config import RunConfig
from alignkit.errors import CheckpointError
from alignkit.outcome import write_outcome
from alignkit.protocols import Wing
from alignkit.result import AlignResult
from alignkit.rollout_files import RolloutTables
from alignkit.run_folder import RunFolder
from alignkit.sample_files import lengths
from alignkit.screen import Alarm, progress, shown, tell
from alignkit.sources import RowSource
from alignkit.trainer import Trainer

NUM_SAMPLES = 8
"""Prompts answered for the report, before and after."""


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
        self.best = BestSoFar(config.trainer.keep_best, config.trainer.early_stop)
        self.average: Average | None = None
        if config.trainer.ema is not None:
            self.average = Average(
                trainer.parameters,
                config.trainer.ema,
                modules=trainer.modules.values(),
                runtime=trainer.runtime,
            )
        self._result: AlignResult | None = None
        self._sampled = -1
        self._rollouts = RolloutTables(trainer.source, wing.prompt_text)
        self._waiting: set[str] = set()
        self._alarm = Alarm()
        # A run that is dropped before its loop gives back what it borrowed, too.
        weakref.finalize(self, wing.release).atexit = False

    @property
    def writes(self) -> bool:
        """Whether this process writes the run folder."""
        return self.folder is not None and self.runtime.is_main

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = checkpoint.load(path)
        if state["fingerprint"] != self.fingerprint:
            raise CheckpointError(
                f"{path} was made by a run that began with other weights than the policy given now "
                "(a model in hand that has been trained already?). Give the policy as it was, or "
                'start anew with resume="never".'
            )
        self.trainer.load_state_dict(state["trainer"])
        self.seconds = state["seconds"]
        self.metrics = dict(state["metrics"])
        self.best.load_state_dict(state["best"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.writes:
            assert self.folder is not None
            self.folder.reopen()
            # In this order: a kill in between leaves no checkpoint without its metrics.
            checkpoint.drop_after(self.folder.checkpoints, self.trainer.step)
            self.history = self.folder.cut_metrics(self.trainer.step)
        self.history = self.runtime.share(self.history)
        if self.runtime.is_main:
            tell(f"Resumed from {path}.")

    def steps(self) -> Iterator[StepRecord]:
        """One record per optimizer step; evaluates, samples and saves when they are due.

        Objects in hand are as the caller gave them, apart from their weights, whenever the loop is
        left.
        """
        with self._in_use():
            yield from self._steps()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """The folder locked, and objects in hand ready to train; given back at the end."""
        if self.writes:
            assert self.folder is not None
            self.folder.lock()
        self.wing.engage()
        try:
            with giving_back(self.folder):
                yield
        finally:
            self.wing.release()

    def abandon(self) -> None:
        """After a failure: leave objects in hand and the run folder as they can be tried again."""
        self.wing.undo()
        if self.writes:
            assert self.folder is not None
            self.folder.unlock()

    def _steps(self) -> Iterator[StepRecord]:
        started = time.perf_counter() - self.seconds
        if self.average is not None:
            self.average.show(False)
        if self.best.should_stop:  # resumed where it had stopped
            return
        if self.trainer.step == 0:
            self._sample(0)
        bar = progress(self.trainer, self.config.method.name)
        with bar:
            for bare in self.trainer.steps():
                if self.average is not None:
                    self.average.update(bare.step)
                record = self._evaluate(bare) if self._due("eval_every", bare.step) else bare
                if self._due("sample_every", record.step):
                    found = self._sample(record.step)
                    record = replace(record, metrics={**record.metrics, **found})
                self.seconds = time.perf_counter() - started
                self._record(record)
                if self.writes and self.folder is not None:
                    self._rollouts.keep(self.folder.samples_dir)
                # Last, so that a run resumed from here lacks nothing of this step.
                due = self._due("save_every", record.step)
                if due or self.best.step_to_keep == record.step:
                    self.save()
                bar.update()
                bar.set_postfix(shown(record, self.metrics), refresh=False)
                yield record
                if self.best.should_stop:
                    return

    def _due(self, name: str, step: int) -> bool:
        """Whether what a cadence asks for is to be done now.

        What comes due in the middle of a source's phase waits for its end: a checkpoint would lose
        the rest of it, and the best step is one of which there is a checkpoint.
        """
        every = getattr(self.config.trainer, name)
        if every is not None and step % every == 0:
            self._waiting.add(name)
        if name not in self._waiting or not self.trainer.source.at_boundary:
            return False
        self._waiting.remove(name)
        return True

    def _record(self, record: StepRecord) -> None:
        line = record.as_dict()
        self.history.append(line)
        self.metrics.update({k: v for k, v in line.items() if k not in ("step", "seconds")})
        if self.writes:
            assert self.folder is not None
            self.folder.append_metrics(line)
        if self.runtime.is_main and any(name.startswith("eval/") for name in line):
            self._alarm.look(self.history)
        if record.metrics and self.config.trainer.trackers:
            values = {k: v for k, v in line.items() if k != "step"}
            self.runtime.accelerator.log(values, step=record.step)

    def _evaluate(self, record: StepRecord) -> StepRecord:
        """The record with the metrics of every held-out set."""
        found = self._held_out()
        self.best.update(found, record.step)
        return replace(record, metrics={**record.metrics, **found})

    def _held_out(self) -> dict[str, float]:
        found: dict[str, float] = {}
        with self._averaged():
            for name, source in self.eval_sources.items():
                prefix = f"eval/{name}/" if name else "eval/"
                values = self.trainer.evaluate(source.once())
                found.update({prefix + metric: value for metric, value in values.items()})
        return found

    def _averaged(self) -> AbstractContextManager[None]:
        """Inside, the policy is the one that is evaluated, sampled from and kept."""
        return nullcontext() if self.average is None else self.average.on()

    def save(self) -> None:
        """Write a checkpoint of this moment; all processes must call it."""
        if self.folder is None:
            return
        state = {
            "trainer": self.trainer.state_dict(),
            "fingerprint": self.fingerprint,
            "seconds": self.seconds,
            "metrics": self.metrics,
            "best": self.best.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }
        if self.writes:
            root = self.folder.checkpoints
            checkpoint.save(checkpoint.folder_of(root, self.trainer.step), state)
            kept = self.best.step_to_keep
            spare = None if kept is None else checkpoint.folder_of(root, kept)
            checkpoint.prune(root, self.config.trainer.keep_checkpoints, spare)
        self.runtime.barrier()

    def _sample(self, step: int) -> dict[str, float]:
        """Answer the report's prompts; with sharded weights all processes must, together.

        Returns:
            how long the answers are, where they have lengths.
        """
        if self.folder is None or not self.prompts or self._sampled == step:
            return {}
        found: dict[str, float] = {}
        if self.writes or self.runtime.sharding != "none":
            given, options, seed = self.prompts, self.config.generation, self.config.seed
            with self._averaged():
                answers, counted = counted_samples(self.wing, given, options, seed)
            found = lengths(**counted) if counted else {}
        if self.writes:
            texts = [self.wing.prompt_text(prompt) for prompt in self.prompts]
            self.folder.write_samples(step, texts, answers, **counted)
        self._sampled = step
        return {f"samples/{name}": n for name, n in self.runtime.share(found).items()}

    def finish(self) -> AlignResult:
        """Save the model, write the report, and return the result."""
        if self._result is None:
            with self._in_use():
                self._result = self._finish()
        return self._result

    def _finish(self) -> AlignResult:
        if self.eval_sources and not any(k.startswith("eval/") for k in self.metrics):
            self.metrics.update(self._held_out())
        self.metrics.update(self._sample(self.trainer.step))
        if self.average is not None:
            self.average.show(True)  # and so it stays in the hands of the caller
        report = write_outcome(self)
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
