"""The text wing's data of one batch: token ids, ragged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

Ids = np.ndarray
"""A 1-D int32 array of token ids."""


@dataclass(frozen=True)
class TextContent:
    """Prompts once per group, completions once per answer.

    Attributes:
        prompts: G id arrays, each with at least one token.
        completions: N id arrays, group-major, each with at least one token.
        owner: for each answer the index of its prompt.
        scored: N bool arrays as long as the completions, True on the tokens that count to the
            likelihood; None where all do. The others are context, such as a user's later turns.
        layout: how the model is to compute it, a name of `packing.LAYOUTS`. It travels with the
            data, so that policy and reference compute alike.
    """

    prompts: tuple[Ids, ...]
    completions: tuple[Ids, ...]
    owner: tuple[int, ...]
    scored: tuple[np.ndarray, ...] | None = None
    layout: str = "padded"

    def select(self, groups: Sequence[int], answers: Sequence[int]) -> TextContent:
        place = {group: new for new, group in enumerate(groups)}
        return replace(
            self,
            prompts=tuple(self.prompts[g] for g in groups),
            completions=tuple(self.completions[a] for a in answers),
            owner=tuple(place[self.owner[a]] for a in answers),
            scored=self._scored(answers),
        )

    def recombine(self, groups: Sequence[int], answers: Sequence[int]) -> TextContent:
        """Groups of one: the prompt of `groups[i]` with the answer `answers[i]`, whosever it is."""
        return replace(
            self,
            prompts=tuple(self.prompts[g] for g in groups),
            completions=tuple(self.completions[a] for a in answers),
            owner=tuple(range(len(answers))),
            scored=self._scored(answers),
        )

    def _scored(self, answers: Sequence[int]) -> tuple[np.ndarray, ...] | None:
        return None if self.scored is None else tuple(self.scored[a] for a in answers)

    def lengths(self) -> list[int]:
        """Tokens of each answer with its prompt."""
        return [
            len(self.prompts[owner]) + len(completion)
            for owner, completion in zip(self.owner, self.completions, strict=True)
        ]

    def counted(self, answer: int) -> np.ndarray:
        """The places, within a completion, of its tokens that count."""
        if self.scored is None:
            return np.arange(len(self.completions[answer]))
        return np.flatnonzero(self.scored[answer])
