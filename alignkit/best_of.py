"""The best of several answers: sampling, scoring and keeping them, a part at a time.

Every scored answer is on disk before the next part is sampled, so that a kill costs one part.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from alignkit.asking import as_asked
from alignkit.atomic import atomic_write
from alignkit.capabilities import CountsTokens
from alignkit.draws import generator
from alignkit.errors import DataError
from alignkit.methods import RejectionSampling
from alignkit.options import GenerationOptions
from alignkit.preferences import by_reward
from alignkit.protocols import Reward, Wing
from alignkit.rows import Row

log = logging.getLogger("alignkit")

PART = 64
"""Prompts that are answered and scored together."""


@dataclass(frozen=True)
class BestOf:
    """Samples K answers to each prompt and keeps them with their scores.

    Attributes:
        method: how many, at which temperatures.
        reward: scores them; what has no score is never picked.
        generation: how they are drawn, apart from the temperature.
        seed: of the draws.
    """

    method: RejectionSampling
    reward: Reward
    generation: GenerationOptions
    seed: int

    def answer(
        self, load: Callable[[], Wing], rows: Sequence[Row], number: int, place: Path | None
    ) -> list[dict[str, Any]]:
        """All rows of round `number`, each with its answers, their scores and which were cut.

        Args:
            load: gives the policy; called once, if anything is left to be answered.
            rows: with `prompt`.
            number: of the round, from 1.
            place: the folder of the parts; None keeps nothing.
        """
        found: list[dict[str, Any]] = []
        wing: Wing | None = None
        starts = range(0, len(rows), PART)
        try:
            for start in tqdm(starts, desc=f"Round {number}: sampling and scoring", disable=None):
                path = None if place is None else place / f"part-{start // PART:06d}.jsonl"
                if path is None or not path.exists():
                    wing = load() if wing is None else wing
                    part = self._part(wing, rows[start : start + PART], number, start)
                    if path is not None:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in part]
                        atomic_write(path, "".join(lines))
                else:
                    text = path.read_text(encoding="utf-8")
                    part = [json.loads(line) for line in text.splitlines()]
                found += part
        finally:
            if wing is not None:
                wing.undo()  # an adapter that it added comes back with the training
        return found

    def _part(
        self, wing: Wing, rows: Sequence[Row], number: int, start: int
    ) -> list[dict[str, Any]]:
        assert isinstance(wing, CountsTokens)
        prompts = [row["prompt"] for row in rows]
        answers: list[list[str]] = [[] for _ in rows]
        cut: list[list[bool]] = [[] for _ in rows]
        for place, (temperature, count) in enumerate(self._counts().items()):
            key = generator("best of", self.seed, number, start, place)
            options = replace(self.generation, temperature=temperature)
            given = wing.sample_counted(prompts * count, options, seed=int(key.integers(2**31)))
            for k, (text, ended) in enumerate(zip(given.answers, given.cut, strict=True)):
                # An empty answer cannot be a row; so it is not scored either.
                if text:
                    answers[k % len(rows)].append(text)
                    cut[k % len(rows)].append(ended)
        judged = by_reward(self.reward, rows, answers)
        return [
            {
                "prompt": as_asked(row["prompt"], wing.chat),
                "responses": given,
                "scores": list(one.scores),
                "cut": ended,
            }
            for row, given, one, ended in zip(rows, answers, judged, cut, strict=True)
        ]

    def _counts(self) -> dict[float, int]:
        """Temperature -> how many of the K answers it draws."""
        every = self.method.temperatures
        drawn = [every[k % len(every)] for k in range(self.method.samples_per_prompt)]
        return {temperature: drawn.count(temperature) for temperature in dict.fromkeys(drawn)}


Best = dict[str, Any]
"""`prompt`, `completion` and `score` of a picked answer."""


def pick(
    answered: Sequence[Mapping[str, Any]], earlier: Mapping[int, Best], *, seed: int, number: int
) -> dict[int, Best]:
    """The best answer to each prompt: place of the prompt -> what is learnt.

    Of equal ones any, by a draw: the first would favour a temperature. Answers that were cut are
    left out, since a demonstration of them would teach to stop there, and so are those without a
    score.

    Args:
        answered: what `BestOf.answer` gave.
        earlier: the best of earlier rounds, which only a better one replaces.
        seed, number: the key of the draw, with the place of the prompt.
    """
    best = dict(earlier)
    for place, row in enumerate(answered):
        whole = [
            (score, text)
            for score, text, cut in zip(row["scores"], row["responses"], row["cut"], strict=True)
            if score is not None and not cut
        ]
        if not whole:
            continue
        top = max(score for score, _ in whole)
        if place in best and best[place]["score"] >= top:
            continue
        equal = [text for score, text in whole if score == top]
        drawn = int(generator("best", seed, number, place).integers(len(equal)))
        best[place] = {"prompt": row["prompt"], "completion": equal[drawn], "score": top}
    if not best:
        raise DataError(
            f"There is nothing to learn from: none of the answers to {len(answered)} prompts both "
            "ended by itself and has a score. Raise generation.max_new_tokens, or look at what the "
            "reward says."
        )
    return best


def told(answered: Sequence[Mapping[str, Any]], best: Mapping[int, Best]) -> dict[str, float]:
    """What a round's sampling came to, as metrics."""
    scores = [score for row in answered for score in row["scores"] if score is not None]
    cuts = [cut for row in answered for cut in row["cut"]]
    picked = [one["score"] for one in best.values()]
    return {
        "best_of/scores": sum(scores) / max(1, len(scores)),
        "best_of/best": sum(picked) / max(1, len(picked)),
        "best_of/cut": sum(cuts) / max(1, len(cuts)),
        "best_of/prompts": float(len(best)),
    }
