"""The text wing's data of one batch: token ids, ragged, and their layout as padded rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

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
    """

    prompts: tuple[Ids, ...]
    completions: tuple[Ids, ...]
    owner: tuple[int, ...]
    scored: tuple[np.ndarray, ...] | None = None

    def select(self, groups: Sequence[int], answers: Sequence[int]) -> TextContent:
        place = {group: new for new, group in enumerate(groups)}
        return TextContent(
            prompts=tuple(self.prompts[g] for g in groups),
            completions=tuple(self.completions[a] for a in answers),
            owner=tuple(place[self.owner[a]] for a in answers),
            scored=self._scored(answers),
        )

    def recombine(self, groups: Sequence[int], answers: Sequence[int]) -> TextContent:
        """Groups of one: the prompt of `groups[i]` with the answer `answers[i]`, whosever it is."""
        return TextContent(
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


@dataclass(frozen=True)
class Rows:
    """A padded layout of N answers, each after its prompt.

    Attributes:
        ids: (N, S) token ids; padding is 0 and masked by position, so any id may be the pad.
        attention: (N, S) bool, True on real tokens.
        start: the first position of any completion.
        completion: (N, S - start) bool, True on the completion tokens that are scored.
    """

    ids: Int[Tensor, "N S"]
    attention: Bool[Tensor, "N S"]
    start: int
    completion: Bool[Tensor, "N K"]

    def to(self, device: torch.device) -> Rows:
        return Rows(
            self.ids.to(device, non_blocking=True),
            self.attention.to(device, non_blocking=True),
            self.start,
            self.completion.to(device, non_blocking=True),
        )


def pad_rows(content: TextContent) -> Rows:
    """Right-padded rows of prompt + completion.

    Masks come from lengths, never from a pad id: pad may equal eos or any other token.
    """
    lengths = content.lengths()
    width = max(lengths)
    ids = np.zeros((len(lengths), width), dtype=np.int64)
    begins = np.array([len(content.prompts[owner]) for owner in content.owner])
    for row, (owner, completion) in enumerate(zip(content.owner, content.completions, strict=True)):
        prompt = content.prompts[owner]
        ids[row, : len(prompt)] = prompt
        ids[row, len(prompt) : lengths[row]] = completion
    places = np.arange(width)
    ends = np.array(lengths)
    start = int(begins.min())
    attention = places < ends[:, None]
    completion_mask = attention & (places >= begins[:, None])
    for row, scored in enumerate(content.scored or ()):
        completion_mask[row, begins[row] : lengths[row]] = scored
    return Rows(
        torch.from_numpy(ids),
        torch.from_numpy(attention),
        start,
        torch.from_numpy(completion_mask[:, start:].copy()),
    )
