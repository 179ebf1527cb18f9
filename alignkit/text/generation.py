"""Sampling answers with transformers' own generate, each answer keyed by numbers of its own.

Prompts of like length are answered together. Rows that are done are taken out when half of a batch
is, so that no step is spent on them, and a prompt that is answered several times is read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from alignkit.capabilities import SampledAnswer
from alignkit.draws import generator
from alignkit.options import GenerationOptions
from alignkit.protocols import Collective
from alignkit.text.content import Ids
from alignkit.text.handed import base_of, max_positions
from alignkit.text.picking import Ends, Pick, processors

TOKENS_PER_BATCH = 16384
RETIRE_AT = 0.5
"""Share of a batch's rows that are left when those that are done are taken out."""
SHARED = 8
"""Tokens of a prompt from which on it is read once for all of its answers."""

_CACHE = "cache" if hasattr(GenerateDecoderOnlyOutput, "cache") else "past_key_values"
"""What this release of transformers calls it."""

KeyOf = Sequence[int]
"""Numbers that identify an answer, such as (seed, place); with the model it depends on no other."""


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Ids],
    options: GenerationOptions,
    keys: Sequence[KeyOf],
    eos_ids: Sequence[int],
    together: Collective | None = None,
) -> list[SampledAnswer]:
    """An answer to each prompt.

    Args:
        model: a causal LM.
        tokenizer: for stop strings.
        prompts: token ids of each prompt.
        options: how to sample.
        keys: of each answer.
        eos_ids: the tokens that end an answer.
        together: the processes among which the model's weights are divided, which all call this,
            each with prompts of its own, and compute in step.
    """
    limit = max_positions(model)
    fitted = [fit(prompt, options.max_new_tokens, limit) for prompt in prompts]
    decoder = Decoder(model, tokenizer, options, eos_ids, in_step=together is not None)
    answers: list[SampledAnswer | None] = [None] * len(prompts)
    with _no_defaults(model), torch.no_grad():
        for places in _in_step(list(_batches(fitted)), together):
            if not places:
                decoder.idle()
                continue
            rows = [
                Row(fitted[place][0], fitted[place][1], _uniforms(options, keys[place]))
                for place in places
            ]
            decoder.answer(rows)
            for place, row in zip(places, rows, strict=True):
                answers[place] = SampledAnswer(row.ids, row.ended, row.logps)
    return [answer for answer in answers if answer is not None]


def fit(prompt: Ids, new_tokens: int, positions: int | None) -> tuple[Ids, int]:
    """The prompt and the length of its answer within the model's positions.

    A prompt that is too long loses its start, but never more than leaves it half of the positions.
    """
    if positions is None or len(prompt) + new_tokens <= positions:
        return prompt, new_tokens
    prompt = prompt[-max(positions - new_tokens, positions // 2) :]
    return prompt, min(new_tokens, positions - len(prompt))


def _uniforms(options: GenerationOptions, key: KeyOf) -> np.ndarray | None:
    if options.temperature == 0:
        return None
    return generator("sample", *key).random(options.max_new_tokens)


def _in_step(batches: list[list[int]], together: Collective | None) -> Iterator[list[int]]:
    """The batches; and empty ones while another process has some left."""
    if together is None:
        yield from batches
        return
    counts = together.gather(torch.tensor([len(batches)]))
    yield from [*batches, *([] for _ in range(int(counts.max()) - len(batches)))]


@contextmanager
def _no_defaults(model: Any) -> Iterator[None]:
    """Inside, the model has no generation defaults of its own.

    `generate` fills what a given config leaves open from the model's own: a repetition penalty or a
    temperature that nobody asked for would make the answers those of another policy.
    """
    owners = [m for m in (model, base_of(model)) if "generation_config" in vars(m)]
    held = [(owner, owner.generation_config) for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, config in held:
            owner.generation_config = config


def _batches(fitted: Sequence[tuple[Ids, int]]) -> list[list[int]]:
    """Prompts of like length and one limit, at most `TOKENS_PER_BATCH` positions each; equal
    prompts stand together.
    """
    batches: list[list[int]] = []

    def order(place: int) -> tuple[int, int, bytes]:
        prompt, limit = fitted[place]
        return limit, len(prompt), prompt.tobytes()

    for place in sorted(range(len(fitted)), key=order):
        prompt, limit = fitted[place]
        width = len(prompt) + limit
        full = not batches or (len(batches[-1]) + 1) * width > TOKENS_PER_BATCH
        if full or fitted[batches[-1][0]][1] != limit:
            batches.append([])
        batches[-1].append(place)
    return batches


@dataclass
class Row:
    """An answer that is being sampled.

    Attributes:
        prompt: what is asked.
        limit: tokens of the answer at most.
        uniforms: a number per token; None takes the likeliest.
        ids, logps: what has been sampled, with its log-probabilities.
        ended: whether an eos or a stop string was reached.
    """

    prompt: Ids
    limit: int
    uniforms: np.ndarray | None
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    ended: bool = False


@dataclass
class Decoder:
    """Answers batches of rows.

    Attributes:
        in_step: run every batch as a whole, in as many steps as the slowest process needs.
    """

    model: Any
    tokenizer: Any
    options: GenerationOptions
    eos_ids: Sequence[int]
    in_step: bool = False

    def answer(self, rows: Sequence[Row]) -> None:
        """Fill in the answers of rows of one limit."""
        ids, mask = self._padded(rows)
        cache = None if self.in_step else self._read_once(rows, ids, mask)
        live = list(rows)
        while live:
            new, cache = self._part(live, ids, mask, cache)
            left = [place for place, row in enumerate(live) if not _is_over(row)]
            if len(left) < len(live):
                index = torch.tensor(left, dtype=torch.int64, device=ids.device)
                if cache is not None and left:
                    cache.reorder_cache(index)
                new, mask, live = new[index], mask[index], [live[place] for place in left]
            grown = new.shape[1] - mask.shape[1]
            ids, mask = new, torch.cat([mask, mask.new_ones(len(mask), grown)], dim=1)

    def idle(self) -> None:
        """Keep step with other processes that have a batch."""
        self.answer([Row(np.zeros(1, dtype=np.int32), 1, None)])

    def _padded(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """(N, T) ids and mask, padded on the left: answers begin at one position."""
        width = max(len(row.prompt) for row in rows)
        ids = np.zeros((len(rows), width), dtype=np.int64)
        mask = np.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, width - len(row.prompt) :] = row.prompt
            mask[place, width - len(row.prompt) :] = 1
        device = next(self.model.parameters()).device
        return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)

    def _read_once(self, rows: Sequence[Row], ids: Tensor, mask: Tensor) -> Any:
        """The cache of all rows' prompts but for their last tokens, each prompt computed once; None
        where that saves little.
        """
        first: dict[bytes, int] = {}
        owner = [first.setdefault(row.prompt.tobytes(), place) for place, row in enumerate(rows)]
        if 2 * len(first) > len(rows) or min(len(row.prompt) for row in rows) < SHARED:
            return None
        kept = list(first.values())
        config = GenerationConfig(max_new_tokens=1, do_sample=False, pad_token_id=0)
        out = self._call(ids[kept, :-1], mask[kept, :-1], config, None)
        cache = _selectable(out)
        if cache is not None:
            index = [kept.index(place) for place in owner]
            cache.reorder_cache(torch.tensor(index, device=ids.device))
        return cache

    def _part(
        self, live: Sequence[Row], ids: Tensor, mask: Tensor, cache: Any
    ) -> tuple[Tensor, Any]:
        """Go on with rows until enough of them are done; the rows with what is new, and the
        cache of all but their last tokens, if it can go on with fewer.
        """
        done, width = len(live[0].ids), ids.shape[1]
        stays = self.in_step or (cache is None and done > 0)
        ends = Ends(
            width,
            [row.ids for row in live],
            eos_ids=torch.tensor(list(self.eos_ids), dtype=torch.int64, device=ids.device),
            stop=self.options.stop,
            tokenizer=self.tokenizer,
            enough=0 if stays else int(len(live) * RETIRE_AT),
        )
        pick = Pick(self._uniforms(live, done, ids.device))
        config = GenerationConfig(
            max_new_tokens=live[0].limit - done, do_sample=False, pad_token_id=0
        )
        out = self._call(
            ids,
            mask,
            config,
            cache,
            logits_processor=processors(self.options, pick),
            stopping_criteria=[ends],
        )
        steps = out.sequences.shape[1] - width
        new = out.sequences[:, width:].tolist()
        logps = torch.stack(pick.logps[:steps], dim=1).tolist()
        for row, length, tokens, values in zip(
            live, ends.lengths.tolist(), new, logps, strict=True
        ):
            row.ended = length > 0
            row.ids += tokens[: length or steps]
            row.logps += values[: length or steps]
        return out.sequences, _selectable(out)

    def _uniforms(self, live: Sequence[Row], done: int, device: torch.device) -> Tensor | None:
        if live[0].uniforms is None:
            return None
        numbers = np.stack([row.uniforms[done : row.limit] for row in live])  # type: ignore[index]
        return torch.from_numpy(numbers).to(device)

    def _call(
        self, ids: Tensor, mask: Tensor, config: GenerationConfig, cache: Any, **more: Any
    ) -> Any:
        config.return_dict_in_generate = True
        held = {} if cache is None else {_CACHE: cache}
        return self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            synced_gpus=self.in_step,
            **held,
            **more,
        )


def _is_over(row: Row) -> bool:
    return row.ended or len(row.ids) == row.limit


def _selectable(out: Any) -> Any:
    """The cache that `generate` leaves, if rows can be taken out of it and it can go on: states of
    linear attention stand for whole rows, and cannot be gone on from with padding before them.
    """
    cache = getattr(out, _CACHE, None)
    return None if cache is None or any(getattr(cache, "is_linear", [True])) else cache
