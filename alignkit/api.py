"""`align()`: one call for every method and modality.

run = build(...)
for record in run.steps(): ...
return run.finish()
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignkit import checkpoint
from alignkit.config import (
    RunConfig,
    changed_keys,
    check,
    from_file,
    resolve_data_options,
    to_mapping,
)
from alignkit.errors import CheckpointError, ConfigError
from alignkit.methods import DPO
from alignkit.options import GenerationOptions, ImageOptions, LoRA, TextOptions, TrainerOptions
from alignkit.parts import build_objective, build_wing, loss_of, modality_of
from alignkit.protocols import Wing
from alignkit.run import NUM_SAMPLES, AlignResult, Run, giving_back
from alignkit.run_folder import RunFolder, environment
from alignkit.runtime import Runtime
from alignkit.sources import RowSource
from alignkit.trainer import Trainer

__all__ = ["AlignResult", "Run", "align", "build", "modality_of", "sample"]

log = logging.getLogger("alignkit")


def align(
    policy: Any,
    method: DPO | None = None,
    data: Any = None,
    *,
    eval_data: Any = None,
    reference: Any = "auto",
    reward: Any = None,
    judge: Any = None,
    adapter: LoRA | None = None,
    data_options: TextOptions | ImageOptions | Mapping[str, Any] | None = None,
    generation: GenerationOptions | None = None,
    trainer: TrainerOptions | None = None,
    run_dir: str | Path | None = None,
    resume: str | Path = "auto",
    seed: int = 0,
) -> AlignResult:
    """Align a model with preferences.

    Main arguments:
        policy: a folder or hub name of a causal language model or of a diffusers pipeline, told
            apart by its files; or `(model, tokenizer)`; or a `DiffusionPipeline`. Weights in hand
            train in place. Alone, the path of a YAML file that holds all arguments.
        method: what to optimise, such as `DPO(beta=0.1)`. Never guessed.
        data: file (jsonl, json, csv, parquet), folder, hub name, `datasets.Dataset` or
            `IterableDataset`, or a list of dicts.
        run_dir: where the run leaves its config, metrics, checkpoints, samples, report and model;
            None writes nothing.

    Other arguments:
        eval_data: held-out rows, or a dict of named sets.
        reference: "auto" (fresh adapter: that adapter off; continued adapter: a copy of its start;
            otherwise a frozen copy), "frozen", "adapter_off", "none", or another model.
        reward, judge: for online methods.
        adapter: `LoRA(...)`; None trains all weights.
        data_options: `TextOptions` or `ImageOptions`.
        generation: how samples are drawn.
        trainer: steps, batch, rates, precision, cadences.
        resume: "auto" continues an interrupted run of `run_dir` and returns a finished one; "must",
            "never", or the path of a checkpoint.
        seed: of shuffle, draws, adapters and samples.

    Raises:
        ConfigError: for options that are unknown or do not go together, before weights are loaded.
        DataError: for rows that cannot be used.
        CheckpointError: for a run folder that cannot be used as asked.
        NonFiniteError: when a loss or gradient is NaN or infinite; no step is taken on it.
    """
    run = build(
        policy,
        method,
        data,
        eval_data=eval_data,
        reference=reference,
        reward=reward,
        judge=judge,
        adapter=adapter,
        data_options=data_options,
        generation=generation,
        trainer=trainer,
        run_dir=run_dir,
        resume=resume,
        seed=seed,
    )
    for _ in run.steps():
        pass
    return run.finish()


def build(policy: Any, method: DPO | None = None, data: Any = None, **arguments: Any) -> Run:
    """The run of the same arguments as `align`, loaded and ready, with its loop in the caller's
    hands.

    run = build(policy, DPO(), data)
    for record in run.steps():
        if record.metrics.get("rewards/accuracies", 0) > 0.9:
            break
    result = run.finish()
    """
    given = {key: value for key, value in arguments.items() if value is not None}
    if method is None and data is None and _is_config(policy):
        if (
            set(given) - {"resume", "seed"}
            or given.get("seed")
            or given.get("resume", "auto") != "auto"
        ):
            _refuse_beside_file(given)
        return _build(from_file(policy))
    if method is None:
        raise ConfigError(
            "align() must be told what to do; give a method, such as align(policy, DPO(), data)."
        )
    return _build(RunConfig(policy, method, data, **given))


def _is_config(policy: Any) -> bool:
    return isinstance(policy, (str, Path)) and str(policy).endswith((".yaml", ".yml"))


def _refuse_beside_file(given: Mapping[str, Any]) -> None:
    defaults = {"reference": "auto", "resume": "auto", "seed": 0}
    beside = sorted(key for key, value in given.items() if defaults.get(key) != value)
    if beside:
        raise ConfigError(
            f"A configuration file holds all arguments; got {', '.join(beside)} beside it. Write "
            "them "
            "in the file, or on the command line as key=value."
        )


def _build(config: RunConfig) -> Run:
    modality = modality_of(config.policy)
    check(config, modality)
    if config.trainer.max_steps is None and config.trainer.epochs is None:
        config = replace(config, trainer=replace(config.trainer, epochs=1.0))
    runtime = Runtime(
        sharding=config.trainer.sharding,
        trackers=config.trainer.trackers,
        logging_dir=None if config.run_dir is None else str(config.run_dir),
    )
    runtime.reset_peak_memory()
    folder = _open_folder(config, runtime)
    with giving_back(folder):
        return _build_in(folder, config, modality, runtime)


def _build_in(folder: RunFolder | None, config: RunConfig, modality: str, runtime: Runtime) -> Run:
    start = _starting_point(config, folder, runtime)
    if start == "finished":
        assert folder is not None
        return _FinishedRun(config, modality, folder, runtime)
    wing = build_wing(config, modality, runtime)
    fingerprint = checkpoint.fingerprint(wing.backend.module)
    objective, resolved = build_objective(config, wing, runtime)
    options = resolve_data_options(config, modality, wing.default_options)
    source = _source(config, wing, options, runtime)
    trainer = Trainer(
        objective, source, config.trainer, runtime=runtime, learning_rate=resolved["learning_rate"]
    )
    resolved["steps"] = trainer.total_steps
    run = Run(
        config,
        wing,
        trainer,
        folder=folder,
        eval_sources=_eval_sources(config, wing, options, runtime),
        prompts=_sample_prompts(config, wing, options),
        facts=_facts(config, wing, source, resolved),
        fingerprint=fingerprint,
    )
    if run.writes:
        assert folder is not None
        if start is None:
            # Only now, when nothing can be wrong with what was given.
            folder.clear()
        mapping = to_mapping(config) | {"resolved": resolved, "environment": environment()}
        folder.write_config(mapping)
    if config.trainer.trackers:
        runtime.accelerator.init_trackers("alignkit", config={"run": str(to_mapping(config))})
    if start is not None:
        run.resume(Path(start))
    if runtime.is_main:
        log.info("%s", _banner(config, resolved))
    return run


def _open_folder(config: RunConfig, runtime: Runtime) -> RunFolder | None:
    if config.run_dir is None:
        return None
    if runtime.is_main:
        folder = RunFolder(config.run_dir)
        folder.lock()
    runtime.barrier()
    return folder if runtime.is_main else RunFolder(config.run_dir)


def _starting_point(config: RunConfig, folder: RunFolder | None, runtime: Runtime) -> str | None:
    """A checkpoint's path, "finished", or None to start anew; decided by the main process."""
    decided = None
    if folder is not None and runtime.is_main:
        decided = _decide(config, folder)
    return runtime.share(decided)


def _decide(config: RunConfig, folder: RunFolder) -> str | None:
    resume = str(config.resume)
    if resume == "never":
        return None
    earlier = folder.read_config()
    if earlier is not None:
        if changed := changed_keys(earlier, to_mapping(config)):
            raise CheckpointError(
                f"The run in {folder.path} was started with another configuration: "
                f"{', '.join(changed)} changed. Use the earlier values, another run_dir, or start "
                'anew with resume="never".'
            )
        if resume in ("auto", "must") and folder.read_result() is not None:
            return "finished"
    if resume not in ("auto", "must"):
        return resume
    found = None if earlier is None else checkpoint.newest(folder.checkpoints)
    if found is None and resume == "must":
        missing = "no run" if earlier is None else "no whole checkpoint"
        raise CheckpointError(
            f'resume="must" found {missing} in {folder.path}. Check run_dir, or use resume="auto" '
            "to start anew."
        )
    return None if found is None else str(found)


def _source(config: RunConfig, wing: Wing, options: Any, runtime: Runtime) -> RowSource:
    examples = wing.examples(config.data, options, kind=config.method.rows, seed=config.seed)
    return RowSource(
        examples,
        batch_size=config.trainer.batch_size,
        epochs=config.trainer.epochs,
        seed=config.seed,
        processes=runtime,
    )


def _eval_sources(
    config: RunConfig, wing: Wing, options: Any, runtime: Runtime
) -> dict[str, RowSource]:
    sets = config.eval_data
    if sets is None:
        return {}
    named = sets if isinstance(sets, Mapping) else {"": sets}
    return {
        name: RowSource(
            wing.examples(data, options, kind=config.method.rows, seed=config.seed),
            batch_size=config.trainer.batch_size,
            epochs=1,
            seed=config.seed,
            processes=runtime,
            shuffle=False,
        )
        for name, data in named.items()
    }


def _sample_prompts(config: RunConfig, wing: Wing, options: Any) -> list[Any]:
    if config.run_dir is None:
        return []
    held_out = config.eval_data
    if isinstance(held_out, Mapping):
        held_out = next(iter(held_out.values()), None)
    data = config.data if held_out is None else held_out
    return wing.prompts(data, options, NUM_SAMPLES)


def _facts(
    config: RunConfig, wing: Wing, source: RowSource, resolved: Mapping[str, Any]
) -> dict[str, Any]:
    """What the report says of the run, apart from its results."""
    _, beta, row = loss_of(config.method, wing.modality)
    loss = config.method.loss
    policy = config.policy if isinstance(config.policy, (str, Path)) else "model in memory"
    method = {
        "name": config.method.name,
        "loss": loss if isinstance(loss, str) else getattr(loss, "__name__", "custom"),
        "equation": row.equation if row else "the user's own function",
        "paper": row.paper if row else config.method.paper,
        "beta": beta,
        **config.method.keywords,
        "reference": resolved["reference"],
        "learning_rate": resolved["learning_rate"],
        "batch_size": config.trainer.batch_size,
        "steps": resolved["steps"],
    }
    facts = {"name": str(policy), **wing.describe(), "adapter": repr(config.adapter)}
    return {
        "title": f"{config.method.name.upper()} on {Path(str(policy)).name or policy}",
        "modality": wing.modality,
        "method": method,
        "policy": facts | {"precision": resolved["precision"], "processes": resolved["processes"]},
        "data": {
            "source": to_mapping(config)["data"],
            "used": source.num_rows,
            "skipped": dict(source.examples.skipped),
        },
    }


def _banner(config: RunConfig, resolved: Mapping[str, Any]) -> str:
    """The numbers that decide a run, filled-in defaults included, in one line."""
    shown = {
        key: resolved[key] for key in ("modality", "beta", "learning_rate", "reference", "steps")
    }
    listed = ", ".join(f"{key} {value}" for key, value in shown.items())
    return f"{config.method!r}: {listed}, batch {config.trainer.batch_size}"


class _FinishedRun(Run):
    """A run that has finished already: no step is left, and the result is read from its folder."""

    def __init__(
        self, config: RunConfig, modality: str, folder: RunFolder, runtime: Runtime
    ) -> None:
        self.config, self.folder, self.runtime = config, folder, runtime
        self.wing = load_trained(config, modality, folder, runtime)
        self.history = folder.read_metrics()

    def steps(self):  # type: ignore[no-untyped-def]
        return iter(())

    def finish(self) -> AlignResult:
        assert self.folder is not None
        result = self.folder.read_result() or {}
        self.folder.unlock()
        return AlignResult(
            model=self.wing.policy,
            tokenizer=self.wing.tokenizer,
            run_dir=self.folder.path,
            history=self.history,
            metrics=result.get("metrics", {}),
            report=self.folder.report_file,
            wing=self.wing,
            generation=self.config.generation,
            seed=self.config.seed,
        )


def load_trained(config: RunConfig, modality: str, folder: RunFolder, runtime: Runtime) -> Wing:
    """The wing of a finished run, from its `model/` (an image adapter also needs its base)."""
    model = str(folder.model_dir)
    if modality == "image" and config.adapter is not None:
        trained = replace(config, adapter=replace(config.adapter, continue_from=model))
    else:
        trained = replace(config, policy=model, adapter=None)
    return build_wing(trained, modality, runtime)


def _is_language_model(folder: Path) -> bool:
    return (folder / "config.json").exists() or (folder / "adapter_config.json").exists()


def sample(
    path: str | Path,
    prompts: Sequence[str],
    generation: GenerationOptions | None = None,
    seed: int = 0,
) -> list[Any]:
    """Answers of the model in `path`: a run folder, a model folder or a hub name.

    Returns:
        strings, or PIL images.
    """
    runtime = Runtime()
    folder, model = Path(path), Path(path) / "model"
    # A language model's folder says all; an image adapter's needs the base that its run names.
    if model.is_dir() and not _is_language_model(model) and (folder / "config.yaml").exists():
        config = from_file(folder / "config.yaml")
        wing = load_trained(config, modality_of(config.policy), RunFolder(folder), runtime)
    else:
        config = RunConfig(str(model if model.is_dir() else path), DPO(), data=[])
        wing = build_wing(config, modality_of(config.policy), runtime)
    return wing.sample(list(prompts), generation or config.generation, seed=seed)
