"""Whether prepared rows fit the model that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignkit.errors import ConfigError
from alignkit.text.content import Ids
from alignkit.text.examples import TextExamples
from alignkit.text.handed import max_positions


def check_fit(policy: Any, examples: TextExamples, room: int = 0) -> None:
    """Ids and positions beyond the embeddings would read past their end, and kill a GPU.

    Args:
        policy: the model.
        examples: the rows.
        room: tokens that a prompt without an answer will be answered with.

    Raises:
        ConfigError: if there are any.
    """
    size = policy.get_input_embeddings().weight.shape[0]
    top, length = 0, 0
    for row in examples.rows:
        top = max(top, *(int(ids.max()) for ids in (row.prompt, *row.answers)))
        length = max(length, len(row.prompt) + max(map(len, row.answers), default=room))
    if top >= size:
        raise ConfigError(
            f"The tokenizer gives id {top} and the model has {size} embeddings: they do not "
            "belong together. Give the model's own tokenizer, or resize the embeddings."
        )
    positions = max_positions(policy)
    if positions is not None and length > positions:
        raise ConfigError(
            f"The longest row has {length} tokens, and the model has {positions} positions. "
            f"Set data_options.max_length={positions}, so that longer rows are cut."
        )


def check_room(policy: Any, prompts: Sequence[Ids], room: int) -> None:
    """Prompts to learn from are never cut without a word.

    Raises:
        ConfigError: a prompt leaves the model no position for an answer of `room` tokens.
    """
    positions, longest = max_positions(policy), max(map(len, prompts), default=0)
    if positions is not None and longest + room > positions:
        raise ConfigError(
            f"A prompt has {longest} tokens and its answer up to {room} "
            f"(generation.max_new_tokens), and the model has {positions} positions. Set "
            f"data_options.max_length={positions} or lower max_new_tokens."
        )
