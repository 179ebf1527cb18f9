"""What of a reward model its weights do not say, in a file beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkit.atomic import atomic_write

NOTES = "reward_model.json"


def write_notes(folder: Path, notes: Mapping[str, Any]) -> None:
    """A file for what there is to say."""
    if notes:
        atomic_write(folder / NOTES, json.dumps(dict(notes), indent=2) + "\n")


def read_notes(folder: Path) -> dict[str, Any]:
    """What `write_notes` wrote; nothing for other people's models."""
    file = folder / NOTES
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def model_folder(place: str | Path) -> Path:
    """The folder of a model, of which a run folder has one inside."""
    inside = Path(place) / "model"
    return inside if inside.is_dir() else Path(place)
