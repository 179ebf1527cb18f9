"""Pairs for a model that reads both answers: each order is one text, and one score.

    P(a beats b | x) = s((f(x, a, b) - f(x, b, a)) / 2)

The two orders stand in the places of the two answers, so that P is the Bradley-Terry probability of
their scores at beta 1/2: antisymmetric by construction, and trained in both orders at once (Jiang
et al. 2023, 2306.02561; Munos et al. 2023, 2312.00886).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from alignkit.batches import Batch
from alignkit.errors import DataError
from alignkit.text.backend import TextBackend
from alignkit.text.content import Ids, TextContent
from alignkit.text.handed import max_positions

BETWEEN = "\n\nOther answer:\n"


def separator_of(tokenizer: Any) -> Ids:
    """The ids between two answers."""
    return np.asarray(tokenizer(BETWEEN, add_special_tokens=False)["input_ids"], dtype=np.int32)


class PairwiseBackend(TextBackend):
    """Evaluates pairs, each answer followed by the other one."""

    def __init__(self, module: nn.Module, separator: Ids) -> None:
        super().__init__(module)
        self.separator = separator

    def split(self, batch: Batch, budget: int | str) -> list[Batch]:
        both = replace(batch, content=self._both_orders(batch.content))
        self._check_room(both)
        return super().split(both, budget)

    def _both_orders(self, content: TextContent) -> TextContent:
        answers = content.completions
        assert len(answers) == 2 * len(content.prompts), "pairs have two answers each"
        found = [
            np.concatenate([answers[place], self.separator, answers[place ^ 1]])
            for place in range(len(answers))
        ]
        return replace(content, completions=tuple(found), scored=None)

    def _check_room(self, batch: Batch) -> None:
        limit = max_positions(getattr(self.module, "module", self.module).model)
        longest = max(batch.content.lengths())
        if limit is not None and longest > limit:
            raise DataError(
                f"A pairwise model reads both answers at once: {longest} tokens with the prompt, "
                f"and it has positions for {limit}. Lower data_options.max_length."
            )
