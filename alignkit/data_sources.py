"""From what a run is given as data to the sources of its batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignkit.bank import Repeated
from alignkit.checks.rows import check_labels
from alignkit.config import RunConfig, resolve_data_options
from alignkit.errors import ConfigError
from alignkit.examples import StreamedExamples
from alignkit.mixtures import Mixture
from alignkit.options import TextOptions
from alignkit.parts import Offline
from alignkit.protocols import Wing
from alignkit.runtime import Runtime
from alignkit.sources import RowSource
from alignkit.splits import SPLIT
from alignkit.stream import is_streamed
from alignkit.stream_source import StreamSource

UNKNOWN = 2**40
"""Numbers that are kept for the rows of a stream whose length nobody knows."""

Sources = tuple[RowSource | StreamSource, dict[str, RowSource]]


def sources_of(
    config: RunConfig, wing: Wing, options: Any, objective: Offline, runtime: Runtime
) -> Sources:
    """The rows to train on, and the held-out sets by name."""
    common: dict[str, Any] = {
        "batch_size": config.trainer.batch_size,
        "seed": config.seed,
        "processes": runtime,
        "mismatched": objective.mismatched,
    }

    def examples(data: Any, read: Any) -> Any:
        found = wing.examples(data, read, seed=config.seed, **objective.reads)
        check_labels(objective.loss, found.labels)
        return found

    def held_out(data: Any) -> RowSource:
        rows, draws = examples(*evaluated(config, data, options)), options.eval_draws
        # Of a mixture, too, every held-out row is seen, and as often as any other.
        rows = Repeated(rows, draws) if draws > 1 or getattr(rows, "parts", ()) else rows
        together = {**common, "batch_size": config.trainer.batch_size * draws}
        return RowSource(rows, epochs=1, shuffle=False, **together)

    training: RowSource | StreamSource
    if streams(config.data, options):
        training = _stream(config, wing, options, objective, common)
    else:
        rows = examples(config.data, options)
        epochs, shuffle = config.trainer.epochs, config.trainer.shuffle
        training = RowSource(rows, epochs=epochs, shuffle=shuffle, **common)
    sets = {} if config.eval_data is None else config.eval_data
    named = sets if isinstance(sets, Mapping) else {"": sets}
    return training, {name: held_out(data) for name, data in named.items()}


def _stream(
    config: RunConfig,
    wing: Any,
    options: TextOptions,
    objective: Offline,
    common: Mapping[str, Any],
) -> StreamSource:
    entries = [("", config.data, 1.0)]
    if isinstance(config.data, Mixture):
        entries = config.data.entries()
    sets: dict[str, StreamedExamples] = {}
    first = 0
    for name, data, _ in entries:
        sets[name] = wing.stream(data, options, first=first, **objective.reads)
        first += sets[name].stream.num_rows or UNKNOWN
    return StreamSource(
        sets,
        buffer=options.shuffle_buffer,
        shuffle=config.trainer.shuffle,
        weights={name: weight for name, _, weight in entries},
        check=lambda examples: check_labels(objective.loss, examples.labels),
        **common,
    )


def evaluated(config: RunConfig, data: Any, options: Any) -> tuple[Any, Any]:
    """A held-out set and the options that it is read with."""
    if isinstance(data, str) and data == SPLIT:
        return config.data, options.split()
    return data, options.held_out()


def streams(data: Any, options: Any) -> bool:
    """Whether training data is streamed."""
    if not isinstance(options, TextOptions):
        return False
    sets = [one for _, one, _ in data.entries()] if isinstance(data, Mixture) else [data]
    return any(is_streamed(one, options.streaming) for one in sets)


def check_data(config: RunConfig, modality: str) -> None:
    """Refuse what cannot be done with the data as they are given, before weights are loaded.

    Raises:
        ConfigError: an endless run, or scores beside a mixture of images.
    """
    if modality != "text":
        options = resolve_data_options(config, modality)
        if isinstance(config.data, Mixture) and getattr(options, "labels", None) is not None:
            raise ConfigError(
                "data_options.labels names the scores of one data set, and data is a mixture of "
                "several. Give one set; or leave data_options.labels out, and say in the rows "
                "of each set which image is chosen."
            )
        return
    options = resolve_data_options(config, modality, TextOptions())
    if streams(config.data, options) and config.trainer.max_steps is None:
        given = "neither" if config.trainer.epochs is None else f"epochs={config.trainer.epochs}"
        raise ConfigError(
            "Streamed data has a length that is known at its end only, so trainer.max_steps says "
            f"when to stop; got {given}. Give max_steps, or data_options.streaming=False, which "
            "reads all of the data first."
        )
