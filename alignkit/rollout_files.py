"""A few answers of each rollout of an online run, on disk: `samples/rollout-000001.jsonl` ..."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.atomic import atomic_write
from alignkit.records import broken, to_json


class RolloutTables:
    """Keeps a few of the answers that an online run learns from.

    Args:
        source: of the run; any but an online one has no rollout.
        prompt_text: a prompt as a person reads it.
    """

    def __init__(self, source: Any, prompt_text: Callable[[Any], str]) -> None:
        self.source = source
        self.prompt_text = prompt_text
        self._kept = 0

    def keep(self, root: Path) -> None:
        """Write the source's newest rollout, once."""
        phase = getattr(self.source, "phase", None)
        if phase is None or phase.number == self._kept:
            return
        rows = [{**row, "prompt": self.prompt_text(row["prompt"])} for row in phase.rows]
        write_rollout(root, phase.number, rows)
        self._kept = phase.number


def write_rollout(root: Path, number: int, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write a rollout's rows below `root`, whole or not at all, in place of earlier ones."""
    target = root / f"rollout-{number:06d}.jsonl"
    atomic_write(target, "".join(to_json(row, "rollout") + "\n" for row in rows))
    return target


def last_rollout(root: Path) -> dict[str, Any] | None:
    """The newest one as a table of the report; None where there is none."""
    found = sorted(root.glob("rollout-*.jsonl"))
    if not found:
        return None
    path = found[-1]
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        table = [_shown(row) for row in rows]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise broken(path, str(error)) from error
    number = int(path.stem.removeprefix("rollout-"))
    return {
        "number": number,
        "rows": table,
        "columns": ["Answer", "Measured"],
        "more": len(found) - 1,
    }


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    score = "no score" if row["score"] is None else f"score {row['score']:.3g}"
    told = [score, f"{row['tokens']:,} tokens" + (", cut" if row["cut"] else "")]
    if "kl" in row:
        told.append(f"log-ratio {row['kl']:.3g} nats")
    return {"prompt": row["prompt"], "answers": [row["answer"], "; ".join(told)]}
