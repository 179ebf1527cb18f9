"""One token per row by a keyed uniform number, and the end of each row, inside transformers'
generate.

`generate` draws a whole batch from one global generator, so that an answer would depend on its
neighbours, and goes on with rows that are done until all are. Here the sampler is a logits
processor, which leaves `generate` nothing to choose, and a stopping criterion notes where each row
ends and gives the batch back when many have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from alignkit.options import GenerationOptions


class Pick(LogitsProcessor):
    """Leaves one token per row possible: the inverse transform of a keyed uniform number.

    Args:
        uniforms: (N, T), a number per row and step; None takes the likeliest token.

    Attributes:
        logps: of each step (N,) float32, the log-probability of what was picked under the
            distribution that it was picked from; 0 for the likeliest.
    """

    def __init__(self, uniforms: Tensor | None) -> None:
        self.uniforms = uniforms
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.uniforms is None:
            self.logps.append(scores.new_zeros(len(scores)))
            return scores
        chances = scores.double().softmax(-1)  # (N, V)
        cumulative = chances.cumsum(-1)
        threshold = self.uniforms[:, len(self.logps), None] * cumulative[:, -1:]
        picked = torch.searchsorted(cumulative, threshold, right=True)
        picked = picked.clamp(max=scores.shape[-1] - 1)
        self.logps.append(chances.gather(-1, picked).squeeze(-1).log().float())
        return scores.fill_(-torch.inf).scatter_(-1, picked, 0.0)


def processors(options: GenerationOptions, pick: Pick) -> LogitsProcessorList:
    """p proportional to exp(logits / temperature), within the top k, within the top p; then the
    pick.
    """
    found = LogitsProcessorList()
    if pick.uniforms is not None:
        if options.temperature != 1:
            found.append(TemperatureLogitsWarper(float(options.temperature)))
        if options.top_k:
            found.append(TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            found.append(TopPLogitsWarper(options.top_p))
    found.append(pick)
    return found


class Ends(StoppingCriteria):
    """Notes at which length each row ends, and stops all when few are left.

    Args:
        width: tokens of the rows before the answers.
        given: what each row has answered already, in an earlier part.
        eos_ids: tokens that end an answer.
        stop: strings that do.
        tokenizer: for the strings.
        enough: stop when at most so many rows go on.

    Attributes:
        lengths: (N,) tokens of each answer in this part, its end included; 0 while it goes on.
    """

    def __init__(
        self,
        width: int,
        given: Sequence[Sequence[int]],
        *,
        eos_ids: Tensor,
        stop: Sequence[str],
        tokenizer: Any,
        enough: int,
    ) -> None:
        self.lengths = torch.zeros(len(given), dtype=torch.int64, device=eos_ids.device)
        self._width = width
        self._given = given
        self._eos = eos_ids
        self._stop = stop
        self._tokenizer = tokenizer
        self._enough = enough
        # Any ordinary token adds a byte, but for those that complete a character.
        self._tail = 8 + max((len(text.encode()) for text in stop), default=0)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        done = self.lengths > 0
        ending = torch.isin(input_ids[:, -1], self._eos)
        if self._stop:
            ending = ending | self._stopped(input_ids, done)
        steps = input_ids.shape[1] - self._width
        self.lengths = self.lengths.masked_fill(ending & ~done, steps)
        over = self.lengths > 0
        return over | ((~over).sum() <= self._enough)

    def _stopped(self, input_ids: Tensor, done: Tensor) -> Tensor:
        """Whether a stop string ends with the last token."""
        found = []
        for given, new, over in zip(
            self._given, input_ids[:, self._width :].tolist(), done.tolist(), strict=True
        ):
            tail = [*given, *new][-self._tail :]
            text = "" if over else self._tokenizer.decode(tail, skip_special_tokens=False)
            found.append(any(stop in text for stop in self._stop))
        return torch.tensor(found, device=input_ids.device)
