"""Rejection sampling as a run: rounds of best-of-K sampling and supervised fine-tuning.

run_dir/answers/round-1/part-*.jsonl   every answer with its score
run_dir/answers/round-1.jsonl          the best ones, which the round learnt
run_dir/rounds/round-1/                that round's run folder
run_dir/                               the last round's
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from alignkit.asking import digest_of, read_prompts
from alignkit.assemble import assemble, check_places, continued
from alignkit.atomic import atomic_write
from alignkit.batches import StepRecord
from alignkit.best_of import Best, BestOf, pick, told
from alignkit.config import NOT_COMPARED, RunConfig, check, resolve_data_options, to_mapping
from alignkit.errors import CheckpointError, ConfigError
from alignkit.methods import SFT, RejectionSampling
from alignkit.mixtures import Mixture
from alignkit.options import TextOptions
from alignkit.parts import build_wing, modality_of
from alignkit.records import keep_or_refuse
from alignkit.result import AlignResult, FinishedRun
from alignkit.reward_names import reward_of
from alignkit.rows import Row
from alignkit.run import Run
from alignkit.run_folder import RunFolder
from alignkit.runtime import Runtime

log = logging.getLogger("alignkit")


class RejectionRun:
    """The run of `RejectionSampling`: `steps()` gives the records of its rounds' training, each
    round numbered from 1, and `finish()` the last round's result.

    Called again on its run folder it goes on where it was: a finished round is not redone, and
    answers that have a score are neither sampled nor scored again.

    Raises:
        ConfigError, DataError, CheckpointError: as `align`.
    """

    def __init__(self, config: RunConfig) -> None:
        assert isinstance(config.method, RejectionSampling)
        self.config, self.method = config, config.method
        self.modality = modality_of(config.policy)
        check(config, self.modality)
        check_places(config, self.modality)
        _check(config, self.method, self.modality)
        options = resolve_data_options(config, self.modality, TextOptions())
        assert isinstance(options, TextOptions)
        self.rows: Sequence[Row] = read_prompts(config.data, options.columns)
        reward = reward_of(config.reward, self.modality)
        self.best_of = BestOf(self.method, reward, config.generation, config.seed)
        self.runtime = Runtime()
        self.folder = None if config.run_dir is None else Path(config.run_dir)
        self.metrics: dict[str, float] = {}
        self._run: Run | FinishedRun | None = None
        if self.folder is not None and self.runtime.is_main:
            self._open(self.folder)
        self.runtime.barrier()

    def _open(self, folder: Path) -> None:
        """Begin the folder, or see that it was begun with the same arguments."""
        RunFolder(folder)
        path = folder / "rejection.json"
        if self.config.resume == "never":
            path.unlink(missing_ok=True)
            for name in ("answers", "rounds"):
                shutil.rmtree(folder / name, ignore_errors=True)
        asked = {**to_mapping(self.config), "prompts": digest_of(self.rows)}
        if self.config.resume == "must" and not path.exists():
            raise CheckpointError(
                f'resume="must" found no run in {folder}. Check run_dir, or use resume="auto" to '
                "start anew."
            )
        keep_or_refuse(path, asked, "rounds of rejection sampling", ignored=NOT_COMPARED)

    def steps(self) -> Iterator[StepRecord]:
        """One record per optimizer step of every round that is not finished."""
        best: dict[int, Best] = {}
        for number in range(1, self.method.rounds + 1):
            best = self._best(number, best)
            place = self._place(number)
            if number < self.method.rounds and _finished(place):
                continue
            run = self._run = assemble(self._training(number, best))
            if isinstance(run, Run):
                run.metrics.update(self.metrics)
            yield from run.steps()
            if number < self.method.rounds:
                run.finish()

    def finish(self) -> AlignResult:
        """The last round's result; of a loop that was left, that of the round it was in."""
        if self._run is None:
            for _ in self.steps():
                pass
        assert self._run is not None
        return self._run.finish()

    def abandon(self) -> None:
        """After a failure: leave objects in hand and the run folder as they can be tried again."""
        if self._run is not None:
            self._run.abandon()

    # --- a round -----------------------------------------------------------------------------

    def _best(self, number: int, earlier: dict[int, Best]) -> dict[int, Best]:
        """The best answers up to a round, as every process sees them."""
        best: dict[int, Best] = {}
        if self.runtime.is_main:
            load = partial(build_wing, self._sampling(number), self.modality, self.runtime)
            answered = self.best_of.answer(load, self.rows, number, self._answers(number))
            kept = earlier if self.method.keep_earlier else {}
            best = pick(answered, kept, seed=self.config.seed, number=number)
            self.metrics = told(answered, best)
            if self.folder is not None:
                lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in best.values()]
                atomic_write(self._learnt(number), "".join(lines))
            log.info("Round %d of %d: %s", number, self.method.rounds, self.metrics)
        best, self.metrics = self.runtime.share((best, self.metrics))
        return best

    def _answers(self, number: int) -> Path | None:
        return None if self.folder is None else self.folder / "answers" / f"round-{number}"

    def _learnt(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / "answers" / f"round-{number}.jsonl"

    def _place(self, number: int) -> Path | None:
        """The run folder of a round: the last one's is that of the whole."""
        if self.folder is None or number == self.method.rounds:
            return self.folder
        return self.folder / "rounds" / f"round-{number}"

    def _sampling(self, number: int) -> RunConfig:
        """What answers in a round: what the round before left."""
        before = self._place(number - 1) if number > 1 else None
        config = replace(self.config, method=SFT())
        return config if before is None else continued(config, self.modality, before / "model")

    def _training(self, number: int, best: dict[int, Best]) -> RunConfig:
        """The supervised run of a round."""
        config = self._sampling(1 if self.method.start == "first" else number)
        options = config.data_options
        if isinstance(options, TextOptions):
            options = replace(options, columns={})
        elif options is not None:
            options = {key: value for key, value in options.items() if key != "columns"}  # type: ignore[union-attr]
        rows: Any = [{k: one[k] for k in ("prompt", "completion")} for one in best.values()]
        if self.folder is not None:
            rows = str(self._learnt(number))
        last = number == self.method.rounds and self.config.resume != "must"
        return replace(
            config,
            data=rows,
            data_options=options,
            reward=None,
            run_dir=self._place(number),
            resume=self.config.resume if last else "auto",
        )


def _finished(place: Path | None) -> bool:
    return place is not None and (place / "result.json").exists()


def _check(config: RunConfig, method: RejectionSampling, modality: str) -> None:
    """What only rounds of sampling and training know.

    Raises:
        ConfigError: for what they cannot do.
    """
    if modality != "text":
        raise ConfigError(
            "RejectionSampling learns texts; the policy is of modality 'image'. Sample pictures "
            "with sample_preferences(...) and train on the chosen ones by SFT()."
        )
    if isinstance(config.data, Mixture):
        raise ConfigError("RejectionSampling takes one set of prompts; got a mixture of several.")
    if method.rounds > 1:
        folder = isinstance(config.policy, (str, Path)) and config.run_dir is not None
        if not folder:
            raise ConfigError(
                f"method.rounds={method.rounds} goes from folder to folder, so the policy must be "
                "a folder or hub name, and run_dir must be given. Save the model with "
                "save_pretrained first, or take one round."
            )
