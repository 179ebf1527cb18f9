"""Checkpoints: everything that has a state, written whole or not at all.

    checkpoints/step-000200/
        state.json            numbers, strings, and where the tensors stand
        tensors.safetensors   every tensor of the state
        manifest.json         digest of each file, written last

A checkpoint is written to a temporary folder, synced, and renamed into place; one that fails its
manifest is passed over with a warning that names it. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignkit.atomic import atomic_folder
from alignkit.errors import CheckpointError

log = logging.getLogger("alignkit")

STATE, TENSORS, MANIFEST = "state.json", "tensors.safetensors", "manifest.json"


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `state` (nested dicts and lists of tensors, numbers, strings, None) as `folder`.

    Raises:
        CheckpointError: if the disk refuses; nothing half-written stays behind.
    """
    tensors: dict[str, Tensor] = {}
    tree = _split(state, "", tensors)
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / TENSORS)
        (temporary / STATE).write_text(json.dumps(tree))
        digests = {name: _digest(temporary / name) for name in (STATE, TENSORS)}
        (temporary / MANIFEST).write_text(json.dumps(digests))


def load(folder: Path) -> dict[str, Any]:
    """The state that `save` wrote; tensors on the CPU.

    Raises:
        CheckpointError: if a file is missing or does not match its digest.
    """
    check(folder)
    tensors = load_file(folder / TENSORS)
    return _join(json.loads((folder / STATE).read_text()), tensors)


def check(folder: Path) -> None:
    """Raise `CheckpointError` unless every file of the checkpoint is whole."""
    try:
        digests = json.loads((folder / MANIFEST).read_text())
        damaged = [name for name in (STATE, TENSORS) if _digest(folder / name) != digests[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"Checkpoint {folder} cannot be read: {error}.") from error
    if damaged:
        raise CheckpointError(
            f"Checkpoint {folder} is damaged: {', '.join(damaged)} does not match its digest."
        )


def newest(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint, or None; damaged ones are passed over with a warning."""
    for folder in sorted(_all(checkpoints), key=step_of, reverse=True):
        try:
            check(folder)
        except CheckpointError as error:
            log.warning("%s It is passed over.", error)
            continue
        return folder
    return None


def prune(checkpoints: Path, keep: int, spare: Path | None = None) -> None:
    """Remove all but the newest `keep` checkpoints, and never `spare`."""
    for folder in sorted(_all(checkpoints), key=step_of)[:-keep]:
        if folder != spare:
            shutil.rmtree(folder)


def drop_after(checkpoints: Path, step: int) -> None:
    """Remove the checkpoints of later steps, which a run that goes on from `step` makes anew."""
    for folder in list(_all(checkpoints)):
        if step_of(folder) > step:
            shutil.rmtree(folder)


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _all(checkpoints: Path) -> Iterator[Path]:
    for folder in checkpoints.glob("step-*"):
        if folder.is_dir() and folder.name.removeprefix("step-").isdigit():
            yield folder


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` with each tensor replaced by its name in `tensors`."""
    if isinstance(value, Tensor):
        # Cloned, because safetensors refuses tensors that share memory.
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"__tensor__": path}
    if isinstance(value, Mapping):
        return {str(k): _split(v, f"{path}/{k}", tensors) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_split(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    return value


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"__tensor__"}:
            return tensors[value["__tensor__"]]
        return {k: _join(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [_join(v, tensors) for v in value]
    return value


def fingerprint(module: nn.Module) -> str:
    """A digest of a model's weights: names, shapes and 1,024 evenly spread elements of each tensor.

    It tells whether a run is resumed on the weights it began with; it does not read all of a large
    model.
    """
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        flat = parameter.detach().flatten()
        spread = torch.linspace(
            0, flat.numel() - 1, min(flat.numel(), 1024), dtype=torch.float64
        ).long()
        sample = flat[spread.to(flat.device)].float().cpu().numpy()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()
