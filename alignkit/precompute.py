"""A table of reference log-likelihoods, computed once, so that training evaluates no reference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from alignkit.atomic import atomic_write
from alignkit.config import RunConfig
from alignkit.errors import ConfigError
from alignkit.methods import DPO
from alignkit.options import TextOptions, TrainerOptions
from alignkit.parts import build_wing, modality_of
from alignkit.runtime import Runtime

CHUNK = 256
"""Rows that are sorted by length and batched together."""


@torch.no_grad()
def precompute_reference(
    policy: Any,
    data: Any,
    *,
    kind: str = "pairs",
    data_options: TextOptions | None = None,
    trainer: TrainerOptions | None = None,
    out: str | Path | None = None,
) -> dict[int, list[float]]:
    """The log-likelihood of every answer in `data` under a language model, for
    `PrecomputedReference`.

    Args:
        policy: a folder, a hub name or (model, tokenizer): the reference.
        data: as `align` takes it.
        kind: of the rows: "pairs", "groups" or "unpaired".
        data_options: those of the run that will use the table; others give other numbers.
        trainer: its `precision` and `micro_batch` are used.
        out: a .jsonl file to write, with the columns `row` and `logps`.

    Returns:
        row number -> one value per answer, in the order of the row's answers.

    Raises:
        ConfigError: if `policy` is no language model.
    """
    if modality_of(policy) != "text":
        raise ConfigError(
            "A reference is computed in advance for language models only; got a diffusers "
            "pipeline, whose likelihoods belong to the draw of one step."
        )
    trainer = trainer or TrainerOptions()
    config = RunConfig(policy, DPO(), data=data, data_options=data_options, trainer=trainer)
    wing = build_wing(config, "text", Runtime())
    examples = wing.examples(data, data_options or wing.default_options, kind=kind, seed=0)
    table: dict[int, list[float]] = {}
    for start in range(0, len(examples), CHUNK):
        rows = range(start, min(start + CHUNK, len(examples)))
        batch = examples.collate(rows, [0] * len(rows))
        found: list[tuple[int, int, float]] = []  # place in the batch, row, number
        for piece in wing.backend.split(batch, trainer.micro_batch):
            total = wing.backend.module(piece, None, frozenset()).total.tolist()
            for group, value in zip(piece.group.tolist(), total, strict=True):
                found.append((int(piece.position[group]), int(piece.row_id[group]), value))
        # By length within a batch, the two answers of a pair read as single ones change places.
        for _, row, value in sorted(found, key=lambda one: one[0]):
            table.setdefault(row, []).append(value)
    wing.release()
    if out is not None:
        _write(table, Path(out))
    return table


def _write(table: Mapping[int, list[float]], path: Path) -> None:
    lines = [json.dumps({"row": row, "logps": table[row]}) for row in sorted(table)]
    atomic_write(path, "\n".join(lines) + "\n")
