"""The text wing's data of one batch: token ids, ragged."""

from __future__ import annotations

import hashlib
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

    def answered(self, answers: Sequence[Sequence[Sequence[int]]]) -> TextContent:
        """The prompts with other answers: of each group its answers' token ids."""
        ids = [np.asarray(answer, dtype=np.int32) for group in answers for answer in group]
        owner = tuple(place for place, group in enumerate(answers) for _ in group)
        return TextContent(self.prompts, tuple(ids), owner, layout=self.layout)

    def lengthened(self) -> TextContent:
        """Every answer with a token more, whose place shows the state after the last one."""
        assert self.scored is None, "answers that the policy wrote count in all their tokens"
        more = np.zeros(1, dtype=np.int32)
        longer = tuple(np.concatenate([answer, more]) for answer in self.completions)
        return replace(self, completions=longer)

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

    def scored_lengths(self) -> list[int]:
        """Tokens of each answer that count."""
        if self.scored is None:
            return [len(completion) for completion in self.completions]
        return [int(scored.sum()) for scored in self.scored]

    def keys(self, group: Sequence[int], what: str) -> list[bytes]:
        """For each answer 16 bytes that stand for everything that one of its numbers depends on,
        apart from the model: the ids, where the answer begins, and which tokens count.

        Args:
            group: (N,) the group of each answer.
            what: "total", or "public", for which the shortest answer of the group counts too.
        """
        assert what in ("total", "public"), what
        shortest: dict[int, int] = {}
        for g, length in zip(group, self.scored_lengths(), strict=True):
            shortest[g] = min(shortest.get(g, length), length)
        found = []
        for answer, completion in enumerate(self.completions):
            prompt = self.prompts[self.owner[answer]]
            sizes = np.array([len(prompt), len(completion)], dtype=np.int64)
            digest = hashlib.blake2b(sizes.tobytes(), digest_size=16)
            digest.update(prompt.astype(np.int32).tobytes())
            digest.update(completion.astype(np.int32).tobytes())
            if self.scored is not None and not self.scored[answer].all():
                digest.update(b"scored" + np.packbits(self.scored[answer]).tobytes())
            if what == "public":
                digest.update(f"public {shortest[group[answer]]}".encode())
            found.append(digest.digest())
        return found

    @classmethod
    def joined(cls, parts: Sequence[TextContent]) -> TextContent:
        """Several contents as one, in their order."""
        starts = np.cumsum([0, *(len(part.prompts) for part in parts)]).tolist()
        scored = None
        if any(part.scored is not None for part in parts):
            scored = tuple(mask for part in parts for mask in part.masks())
        return cls(
            prompts=tuple(prompt for part in parts for prompt in part.prompts),
            completions=tuple(answer for part in parts for answer in part.completions),
            owner=tuple(
                start + owner
                for start, part in zip(starts, parts, strict=False)
                for owner in part.owner
            ),
            scored=scored,
        )

    def masks(self) -> tuple[np.ndarray, ...]:
        """`scored`, also where all tokens count."""
        if self.scored is not None:
            return self.scored
        return tuple(np.ones(len(completion), dtype=bool) for completion in self.completions)
