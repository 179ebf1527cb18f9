"""From `RewardModel(...)` to what a run needs: how rows are read, the objective, what is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from alignkit.config import RunConfig, resolve_data_options
from alignkit.criteria import reward_loss_of
from alignkit.errors import ConfigError, DataError
from alignkit.losses import SUPERVISED_LOSSES
from alignkit.methods import RewardModel
from alignkit.mixtures import Mixture
from alignkit.objectives.criterion import Criterion
from alignkit.objectives.preference import PreferenceObjective
from alignkit.objectives.reward_model import REWARD_KINDS
from alignkit.objectives.supervised import SupervisedObjective
from alignkit.options import TextOptions
from alignkit.protocols import Wing
from alignkit.reference import NoReference
from alignkit.rows import read_rows
from alignkit.sources import RowSource
from alignkit.stream import is_streamed, open_stream
from alignkit.stream_source import StreamSource

RANKED = ("responses", "responses_ids", "completions")
"""Columns of rankings, ours and UltraFeedback's."""


def scalar_options(method: Any) -> dict[str, Any] | None:
    """What a text wing is told to score answers; None for what is a language model."""
    if not isinstance(method, RewardModel) or method.kind == "critique":
        return None
    levels = method.levels if method.trained_on == "ordinal" else None
    return {
        "outputs": 1 if levels is None else levels - 1,
        "ordinal": levels is not None,
        "pairwise": method.kind == "pairwise",
    }


def reward_objective(
    config: RunConfig, wing: Wing
) -> tuple[PreferenceObjective | SupervisedObjective, dict[str, Any]]:
    """The objective of a reward model, and what was filled in."""
    method = config.method
    assert isinstance(method, RewardModel)
    common: dict[str, Any] = {"seed": config.seed, "budget": config.trainer.micro_batch}
    if method.kind == "critique":
        critic = SupervisedObjective(
            wing.backend, SUPERVISED_LOSSES["nll"], rows="critiques", **common
        )
        wing.notes = {"critique": dict(method.worth)}  # type: ignore[attr-defined]
        return critic, {"reference": "none"}
    row = reward_loss_of(method)
    kind = "rated" if method.kind == "regression" else _comparison(config)
    if kind not in row.rows:
        raise ConfigError(
            f"RewardModel(kind={method.kind!r}, loss={row.name!r}) reads rows of "
            f"{' or '.join(row.rows)}, and these are {kind}. Take another kind or loss."
        )
    wants = row.wants
    if method.per_token:
        wants |= {"values", "token_mask"}
    loss = row.rows[kind]
    options = ("label_smoothing", "centering", "huber")
    criterion = Criterion(
        loss,
        # Of a pair both orders are read: P = s((f(a, b) - f(b, a)) / 2).
        0.5 if method.kind == "pairwise" else 1.0,
        {name: getattr(method, name) for name in options if name in loss.keywords},
        read_as=replace(REWARD_KINDS[kind], wants=wants),
    )
    objective = PreferenceObjective(wing.backend, NoReference(), criterion, **common)
    return objective, {"reference": "none", "rows": kind}


def _comparison(config: RunConfig) -> str:
    """ "groups" or "pairs", whichever the data's first row is."""
    options = resolve_data_options(config, "text", TextOptions())
    assert isinstance(options, TextOptions)
    data = config.data
    if isinstance(data, Mixture):
        data = next(one for _, one, _ in data.entries())
    streamed = is_streamed(data, options.streaming)
    rows = (open_stream if streamed else read_rows)(data, columns=options.columns)
    first = next(iter(rows), {})
    return "groups" if any(name in first for name in RANKED) else "pairs"


def calibrate(objective: Any, wing: Any, source: RowSource | StreamSource, method: Any) -> None:
    """Bring ratings to mean 0 and spread 1 for the head, where that is asked for.

    A function of the data alone, so that a run that goes on finds the same numbers.

    Raises:
        DataError: ratings all the same, or for an ordinal head no whole numbers below `levels`.
    """
    if not isinstance(method, RewardModel) or method.kind != "regression":
        return
    if isinstance(source, StreamSource):
        if method.standardize and method.trained_on == "regression":
            raise ConfigError(
                "Ratings are standardised by their mean and spread, which a stream does not tell "
                "beforehand. Write data_options.streaming=False, or method.standardize=False."
            )
        return
    ratings = torch.tensor(
        [label.score[0] for label in source.examples.labels.labels], dtype=torch.float64
    )
    if method.trained_on == "ordinal":
        assert method.levels is not None
        whole = (ratings == ratings.round()) & (ratings >= 0) & (ratings < method.levels)
        if not bool(whole.all()):
            raise DataError(
                f"An ordinal reward model with levels={method.levels} learns ratings 0, 1, ... "
                f"{method.levels - 1}; got {float(ratings[~whole][0]):g}."
            )
        return
    if not method.standardize:
        return
    mean, spread = float(ratings.mean()), float(ratings.std(correction=0))
    if not spread > 0 or not math.isfinite(spread):
        raise DataError(
            f"All ratings are {mean:g}, and there is nothing to learn. Check the column score."
        )
    module = wing.module
    if not wing.goes_on:  # its head was made for another scale
        module.offset, module.scale = mean, spread
    keywords: Mapping[str, Any] = {**objective.criterion.keywords, "scale": spread}
    objective.criterion = replace(objective.criterion, keywords=keywords)
