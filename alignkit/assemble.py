"""From one configuration to a run: folder, wing, data, objective, trainer, in this order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignkit import checkpoint
from alignkit.cached import expect
from alignkit.config import RunConfig, changed_keys, check, resolve_data_options, to_mapping
from alignkit.criteria import describe
from alignkit.data_sources import check_data, evaluated, sources_of
from alignkit.errors import CheckpointError, ConfigError
from alignkit.mixtures import Mixture
from alignkit.options import LoRA
from alignkit.parts import build_objective, build_wing, modality_of
from alignkit.places import is_missing
from alignkit.protocols import Wing
from alignkit.reference_bank import BankedReference
from alignkit.references import model_of
from alignkit.result import FinishedRun
from alignkit.reward_models import calibrate
from alignkit.rollout_sources import rollout_sources_of
from alignkit.rows import refuse_missing
from alignkit.run import NUM_SAMPLES, Run, giving_back
from alignkit.run_folder import RunFolder, environment
from alignkit.runtime import Runtime, pick_precision
from alignkit.screen import tell
from alignkit.sources import RowSource
from alignkit.splits import SPLIT
from alignkit.stream_source import StreamSource
from alignkit.trainer import Trainer


def assemble(config: RunConfig) -> Run | FinishedRun:
    """The run of `config`, loaded and ready, or what an earlier one left."""
    modality = modality_of(config.policy)
    check(config, modality)
    check_places(config, modality)
    check_data(config, modality)
    if config.trainer.max_steps is None and config.trainer.epochs is None:
        config = replace(config, trainer=replace(config.trainer, epochs=1.0))
    runtime = Runtime(
        sharding=config.trainer.sharding,
        precision=pick_precision(config.trainer.precision),
        trackers=config.trainer.trackers,
        logging_dir=None if config.run_dir is None else str(config.run_dir),
    )
    runtime.reset_peak_memory()
    folder = _open_folder(config, runtime)
    with giving_back(folder):
        return _assemble_in(folder, config, modality, runtime)


def check_places(config: RunConfig, modality: str) -> None:
    """Refuse paths that lead nowhere, and a reference of another kind, before weights are loaded.

    Raises:
        DataError: for data that is not there.
        ConfigError: for an adapter or a reference that is not there or does not fit.
    """
    sets = list(config.eval_data.values()) if isinstance(config.eval_data, Mapping) else []
    if isinstance(config.data, Mixture):
        sets = [*sets, *(data for _, data, _ in config.data.entries())]
    for data in (config.data, config.eval_data, *sets):
        if isinstance(data, (str, Path)) and data != SPLIT:
            refuse_missing(data)
    start = None if config.adapter is None else config.adapter.continue_from
    if start is not None and is_missing(start):
        raise ConfigError(f"adapter.continue_from must exist; there is no folder {start!r}.")
    model = model_of(config.reference)
    if model is not None:
        found = modality_of(model, "reference")
        if found != modality:
            raise ConfigError(
                f"The reference must be of the policy's modality, {modality!r}; "
                f"{model!r} is of modality {found!r}."
            )


def _assemble_in(
    folder: RunFolder | None, config: RunConfig, modality: str, runtime: Runtime
) -> Run | FinishedRun:
    start = _starting_point(config, folder, runtime)
    if start == "finished":
        assert folder is not None
        wing = load_trained(config, modality, folder.model_dir, runtime)
        told = (folder.read_config() or {}).get("resolved") or {}
        wing.chat = told.get("chat", wing.chat)
        return FinishedRun(config, wing, folder)
    wing = build_wing(config, modality, runtime)
    try:
        return _assemble_around(wing, folder, config, runtime, start)
    except BaseException:
        wing.undo()
        raise


def _assemble_around(
    wing: Wing, folder: RunFolder | None, config: RunConfig, runtime: Runtime, start: str | None
) -> Run:
    fingerprint = checkpoint.fingerprint(wing.backend.module)
    objective, resolved = build_objective(config, wing, runtime)
    options = resolve_data_options(config, wing.modality, wing.default_options)
    make: Any = rollout_sources_of if config.method.online else sources_of
    source, eval_sources = make(config, wing, options, objective, runtime)
    expect(config, objective, source, eval_sources)
    calibrate(objective, wing, source, config.method)
    trainer = Trainer(
        objective, source, config.trainer, runtime=runtime, learning_rate=resolved["learning_rate"]
    )
    resolved |= {"steps": trainer.total_steps, "chat": wing.chat}
    run = Run(
        config,
        wing,
        trainer,
        folder=folder,
        eval_sources=eval_sources,
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
    reference = getattr(objective, "reference", None)
    if isinstance(reference, BankedReference):
        assert isinstance(source, RowSource)  # images are not streamed
        reference.fill(source.examples)
    if runtime.is_main:
        tell(_banner(config, resolved))
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


def _sample_prompts(config: RunConfig, wing: Wing, options: Any) -> list[Any]:
    if config.run_dir is None:
        return []
    held_out = config.eval_data
    if isinstance(held_out, Mapping):
        held_out = next(iter(held_out.values()), None)
    if held_out is None:
        return wing.prompts(config.data, options, NUM_SAMPLES)
    return wing.prompts(*evaluated(config, held_out, options), NUM_SAMPLES)


def _facts(
    config: RunConfig,
    wing: Wing,
    source: RowSource | StreamSource,
    resolved: Mapping[str, Any],
) -> dict[str, Any]:
    """What the report says of the run, apart from its results."""
    policy = config.policy if isinstance(config.policy, (str, Path)) else "model in memory"
    method = describe(config.method, wing.modality) | {
        "reference": resolved["reference"],
        "learning_rate": resolved["learning_rate"],
        "batch_size": config.trainer.batch_size,
        "steps": resolved["steps"],
    }
    adapter = "none" if config.adapter is None else repr(config.adapter)
    facts = {"name": str(policy), **wing.describe(), "adapter": adapter}
    return {
        "title": f"{config.method.name.upper()} on {Path(str(policy)).name or policy}",
        "modality": wing.modality,
        "method": method,
        "policy": facts | {"precision": resolved["precision"], "processes": resolved["processes"]},
        "data": {"source": to_mapping(config)["data"], **source.facts()},
    }


def _banner(config: RunConfig, resolved: Mapping[str, Any]) -> str:
    """The numbers that decide a run, filled-in defaults included, in one line."""
    names = ("modality", "beta", "learning_rate", "reference", "steps")
    shown = {key: resolved[key] for key in names if key in resolved}
    listed = ", ".join(f"{key} {value}" for key, value in shown.items())
    return f"{config.method!r}: {listed}, batch {config.trainer.batch_size}"


def load_trained(config: RunConfig, modality: str, model: Path, runtime: Runtime) -> Wing:
    """The wing of a finished run, from its `model/`."""
    return build_wing(continued(config, modality, model), modality, runtime)


def continued(config: RunConfig, modality: str, model: Path) -> RunConfig:
    """The same run, going on from what a finished one left in its `model/`.

    An adapter goes onto its base: an image adapter's folder does not name it, nor does that of a
    model in hand.
    """
    if modality == "image":
        onto_base = not (model / "model_index.json").is_file()
    else:
        onto_base = config.adapter is not None and not isinstance(config.policy, (str, Path))
    if onto_base:
        return replace(config, adapter=LoRA(continue_from=str(model)))
    return replace(config, policy=str(model), adapter=None)
