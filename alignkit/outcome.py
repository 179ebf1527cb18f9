"""What a run leaves when it is done: model and card, report, and the mark of being done."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from alignkit.atomic import atomic_folder
from alignkit.cite import citations
from alignkit.criteria import cited_options, named_losses
from alignkit.errors import CheckpointError
from alignkit.facts import ReportFacts
from alignkit.model_card import model_card
from alignkit.report import write_report
from alignkit.run_folder import RunFolder

if TYPE_CHECKING:
    from alignkit.run import Run


def write_outcome(run: Run) -> Path | None:
    """Write `model/`, `report.html` and `result.json`; all processes must call it.

    Returns:
        The path of the report, or None without a run folder.
    """
    weights = _full_weights(run)
    if run.folder is None:
        return None
    if run.writes:
        facts = _facts(run, run.folder)
        _write_model(run, run.folder, facts, weights)
        write_report(run.folder, facts)
        metrics = {name: value for name, value in run.metrics.items() if math.isfinite(value)}
        run.folder.write_result(
            {"facts": facts.as_dict(), "metrics": metrics, "steps": run.trainer.step}
        )
        if run.config.trainer.push_to_hub is not None:
            _push_to_hub(run.config.trainer.push_to_hub, run.folder)
        run.folder.unlock()
    run.runtime.barrier()
    return run.folder.report_file


def _facts(run: Run, folder: RunFolder) -> ReportFacts:
    method, adapter = run.config.method, run.config.adapter
    # Of a stream, what was left out is known now.
    data = {**run.facts["data"], **getattr(run.trainer.source, "facts", dict)()}
    return ReportFacts(
        **{**run.facts, "data": data},
        citations=citations(
            method.name,
            named_losses(method),
            run.wing.modality,
            None if adapter is None else adapter.kind,
            cited_options(method, run.config.reference),
        ),
        seconds=run.seconds,
        peak_memory_bytes=run.runtime.peak_memory(),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        run_dir=str(folder.path),
    )


def _write_model(
    run: Run, folder: RunFolder, facts: ReportFacts, weights: dict[str, Tensor] | None
) -> None:
    policy = run.config.policy
    base = str(policy) if isinstance(policy, (str, Path)) else None
    with atomic_folder(folder.model_dir) as temporary:
        run.wing.save(temporary, base=base, weights=weights)
        files = sorted(path.name for path in temporary.iterdir())
        card = model_card(facts, base=base, modality=run.wing.modality, files=files)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def _full_weights(run: Run) -> dict[str, Tensor] | None:
    """The policy's weights gathered from their shards; None where they are whole already."""
    if run.runtime.sharding == "none":
        return None
    state = run.wing.policy.state_dict(keep_vars=True)
    # Tied weights stay one tensor, so that they are written once.
    distinct = {id(value): value for value in state.values()}
    whole = {key: run.runtime.whole(value) for key, value in distinct.items()}
    return {name: whole[id(value)] for name, value in state.items()}


def _push_to_hub(name: str, folder: RunFolder) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder.model_dir)
    except Exception as error:  # the hub client and the network have no common base
        raise CheckpointError(
            f"The run is finished, and its model could not be pushed to {name!r}: {error} Push it "
            f"with `hf upload {name} {folder.model_dir}`."
        ) from error
