"""`align()`: one call for every method and modality.

run = build(...)
for record in run.steps(): ...
return run.finish()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.assemble import assemble
from alignkit.config import RunConfig, from_file
from alignkit.errors import ConfigError
from alignkit.methods import Method, RejectionSampling
from alignkit.options import GenerationOptions, ImageOptions, LoRA, TextOptions, TrainerOptions
from alignkit.parts import modality_of
from alignkit.rejection import RejectionRun
from alignkit.result import AlignResult, FinishedRun
from alignkit.run import Run
from alignkit.runtime import Runtime
from alignkit.schema import hints, refuse_unknown_keys
from alignkit.trained import load, source_of

__all__ = ["AlignResult", "Run", "align", "build", "modality_of", "sample"]


def align(
    policy: Any,
    method: Method | None = None,
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
            otherwise a frozen copy), "frozen", "adapter_off", "none", an `AdapterReference`,
            `CachedReference`, `EMAReference`, `SyncedReference` or `PrecomputedReference`, or
            another model.
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
    try:
        for _ in run.steps():
            pass
        return run.finish()
    except BaseException:
        run.abandon()
        raise


def build(
    policy: Any, method: Method | None = None, data: Any = None, **arguments: Any
) -> Run | FinishedRun | RejectionRun:
    """The run of the same arguments as `align`, loaded and ready, with its loop in the caller's
    hands.

    run = build(policy, DPO(), data)
    for record in run.steps():
        if record.metrics.get("rewards/accuracies", 0) > 0.9:
            break
    result = run.finish()
    """
    config = config_of(policy, method, data, **arguments)
    return (
        RejectionRun(config) if isinstance(config.method, RejectionSampling) else assemble(config)
    )


def config_of(
    policy: Any, method: Method | None = None, data: Any = None, **arguments: Any
) -> RunConfig:
    """The arguments of `align` as one value."""
    known = [name for name in hints(RunConfig) if name not in ("policy", "method", "data")]
    refuse_unknown_keys("", arguments, known)
    given = {key: value for key, value in arguments.items() if value is not None}
    if method is None and data is None and str(policy).endswith((".yaml", ".yml")):
        _refuse_beside_file(given)
        return from_file(policy)
    if method is None:
        raise ConfigError(
            "align() must be told what to do; give a method, such as align(policy, DPO(), data)."
        )
    return RunConfig(policy, method, data, **given)


def _refuse_beside_file(given: Mapping[str, Any]) -> None:
    defaults = {"reference": "auto", "resume": "auto", "seed": 0}
    beside = sorted(key for key, value in given.items() if defaults.get(key) != value)
    if beside:
        raise ConfigError(
            f"A configuration file holds all arguments; got {', '.join(beside)} beside it. Write "
            "them in the file, or on the command line as key=value."
        )


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
    source = source_of(path)
    wing = load(source, Runtime(), seed=seed)
    return wing.sample(list(prompts), generation or source.generation, seed=seed)
