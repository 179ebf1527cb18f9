"""From what an online run is given to the sources of its batches: prompts, reward, rows beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from alignkit.answering import Writer
from alignkit.batches import Batch
from alignkit.config import RunConfig
from alignkit.data_sources import streams
from alignkit.errors import ConfigError
from alignkit.held_out_prompts import HeldOutPrompts
from alignkit.mixtures import Mixture
from alignkit.objectives.policy_gradient import PolicyGradientObjective
from alignkit.online import controller_of
from alignkit.options import TextOptions
from alignkit.reward_names import name_of, reward_of
from alignkit.rewards import bind
from alignkit.rollouts import RolloutSource
from alignkit.runtime import Runtime
from alignkit.scoring import scores_of
from alignkit.sources import RowSource
from alignkit.stream_source import StreamSource

ALONE: Any = SimpleNamespace(rank=0, size=1)
"""Every process reads all prompts: they are few, and whatever is drawn is keyed by their place."""


@dataclass(frozen=True)
class RowsBeside:
    """A batch of other rows for each optimizer step: a function of the step, so that there is no
    state.
    """

    source: RowSource

    def __call__(self, step: int) -> Batch:
        self.source.consumed = (step - 1) * self.source.batch_size
        return next(iter(self.source))


def rollout_sources_of(
    config: RunConfig, wing: Any, options: Any, objective: PolicyGradientObjective, runtime: Runtime
) -> tuple[RolloutSource, dict[str, HeldOutPrompts]]:
    """The source that trains, and the held-out prompts by name."""
    method: Any = config.method
    reward = reward_of(config.reward, wing.modality, device=str(runtime.device))
    bind(reward, runtime)
    writer = Writer(
        wing,
        partial(scores_of, reward, name_of(config.reward, reward)),
        config.generation,
        seed=config.seed,
        sharded=runtime.sharding != "none",
    )
    reads: Mapping[str, Any] = {"kind": "prompts", "room": config.generation.max_new_tokens}
    rollout = method.rollout_size or config.trainer.batch_size
    prompts, rows = _prompts(config, wing, options, reads, rollout // method.samples_per_prompt)
    phases = None
    if rows is not None and config.trainer.epochs is not None:
        phases = max(1, round(config.trainer.epochs * rows * method.samples_per_prompt / rollout))
    if method.ptx_data is not None:
        objective.beside = _beside(config, wing, options, runtime)
    source = RolloutSource(
        prompts,
        writer,
        objective,
        controller_of(method),
        batch_size=config.trainer.batch_size,
        rollout_size=rollout,
        phases=phases,
        seed=config.seed,
        processes=runtime,
    )
    held_out = {} if config.eval_data is None else config.eval_data
    named = held_out if isinstance(held_out, Mapping) else {"": held_out}
    sets = {}
    for name, data in named.items():
        examples = wing.examples(data, options.held_out(), seed=config.seed, **reads)
        asked = _rows(examples, config, rollout, epochs=1.0, shuffle=False)
        sets[name] = HeldOutPrompts(asked, writer, objective, runtime)
    return source, sets


def _prompts(
    config: RunConfig, wing: Any, options: TextOptions, reads: Mapping[str, Any], groups: int
) -> tuple[RowSource | StreamSource, int | None]:
    if streams(config.data, options):
        if isinstance(config.data, Mixture):
            raise ConfigError(
                "A mixture of prompts is read as a whole, and data_options.streaming asks to "
                "stream it. Write streaming=False, or give one set."
            )
        stream = wing.stream(config.data, options, **reads)
        source = StreamSource(
            {"": stream},
            buffer=options.shuffle_buffer,
            shuffle=config.trainer.shuffle,
            batch_size=groups,
            seed=config.seed,
            processes=ALONE,
        )
        return source, None
    examples = wing.examples(config.data, options, seed=config.seed, **reads)
    rows = _rows(examples, config, groups, epochs=None, shuffle=config.trainer.shuffle)
    return rows, rows.num_rows


def _rows(
    examples: Any, config: RunConfig, groups: int, *, epochs: float | None, shuffle: bool
) -> RowSource:
    return RowSource(
        examples,
        batch_size=groups,
        epochs=epochs,
        seed=config.seed,
        processes=ALONE,
        shuffle=shuffle,
    )


def _beside(config: RunConfig, wing: Any, options: Any, runtime: Runtime) -> RowsBeside:
    method: Any = config.method
    chat = wing.chat
    examples = wing.examples(
        method.ptx_data, options.held_out(), kind="supervised", seed=config.seed
    )
    wing.chat = chat  # plain texts beside say nothing of how prompts are asked
    return RowsBeside(
        RowSource(
            examples,
            batch_size=config.trainer.batch_size,
            epochs=None,
            seed=config.seed,
            processes=runtime,
        )
    )
