"""Sampling answers with transformers' own generate, each answer keyed by (seed, its prompt's
place).

`generate` draws a whole batch from one global generator, so that an answer would depend on its
neighbours. Here the sampler is a logits processor: it picks one token per row by inverse transform
of a counter-based uniform number and leaves `generate` nothing to choose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from alignkit.draws import generator
from alignkit.options import GenerationOptions
from alignkit.text.content import Ids
from alignkit.text.handed import base_of, max_positions

TOKENS_PER_BATCH = 16384


class _KeyedPick(LogitsProcessor):
    """Leaves one token per row possible: the inverse transform of a keyed uniform number."""

    def __init__(self, uniforms: Tensor) -> None:
        self.uniforms = uniforms  # (N, max_new_tokens)
        self.time = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = scores.double().softmax(-1).cumsum(-1)  # (N, V)
        threshold = self.uniforms[:, self.time, None] * cumulative[:, -1:]
        picked = torch.searchsorted(cumulative, threshold, right=True)
        picked = picked.clamp(max=scores.shape[-1] - 1)
        self.time += 1
        return torch.full_like(scores, -torch.inf).scatter(-1, picked, 0.0)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Ids],
    options: GenerationOptions,
    *,
    seed: int,
    eos_ids: Sequence[int],
) -> list[list[int]]:
    """New token ids per prompt, the closing eos included where the answer ended.

    Args:
        model: a causal LM.
        tokenizer: for stop strings.
        prompts: token ids of each prompt.
        options: how to sample.
        seed: answer i is a function of (seed, i) and the model.
        eos_ids: the tokens that end an answer.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    fitted = [_fit(prompt, options.max_new_tokens, max_positions(model)) for prompt in prompts]
    with _no_defaults(model):
        for places in _batches(fitted):
            ids = [fitted[place][0] for place in places]
            limited = replace(options, max_new_tokens=fitted[places[0]][1])
            texts = _generate_batch(model, tokenizer, ids, places, limited, seed, eos_ids)
            for place, answer in zip(places, texts, strict=True):
                answers[place] = answer
    return answers


def _fit(prompt: Ids, new_tokens: int, positions: int | None) -> tuple[Ids, int]:
    """The prompt and the length of its answer within the model's positions.

    A prompt that is too long loses its start, but never more than leaves it half of the positions.
    """
    if positions is None or len(prompt) + new_tokens <= positions:
        return prompt, new_tokens
    prompt = prompt[-max(positions - new_tokens, positions // 2) :]
    return prompt, min(new_tokens, positions - len(prompt))


def is_cut(
    prompt: Ids,
    answer: Sequence[int],
    options: GenerationOptions,
    positions: int | None,
    eos_ids: Sequence[int],
    text: str,
) -> bool:
    """Whether the answer was ended by its limit, and not by an eos or a stop string."""
    _, limit = _fit(prompt, options.max_new_tokens, positions)
    stopped = answer[-1] in eos_ids or any(stop in text for stop in options.stop)
    return len(answer) == limit and not stopped


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
    """Prompts of like length and one limit, at most `TOKENS_PER_BATCH` positions each."""
    batches: list[list[int]] = []
    order = sorted(range(len(fitted)), key=lambda p: (fitted[p][1], len(fitted[p][0])))
    for place in order:
        prompt, limit = fitted[place]
        width = len(prompt) + limit
        full = not batches or (len(batches[-1]) + 1) * width > TOKENS_PER_BATCH
        if full or fitted[batches[-1][0]][1] != limit:
            batches.append([])
        batches[-1].append(place)
    return batches


@torch.no_grad()
def _generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Ids],
    places: Sequence[int],
    options: GenerationOptions,
    seed: int,
    eos_ids: Sequence[int],
) -> list[list[int]]:
    width = max(len(prompt) for prompt in prompts)
    ids = np.zeros((len(prompts), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # left padding: answers begin at one position
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    device = next(model.parameters()).device
    config = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=eos_ids[0] if eos_ids else 0,
        stop_strings=list(options.stop) or None,
    )
    out = model.generate(
        input_ids=torch.from_numpy(ids).to(device),
        attention_mask=torch.from_numpy(mask).to(device),
        generation_config=config,
        logits_processor=_processors(options, seed, places, device),
        **({"tokenizer": tokenizer} if options.stop else {}),
    )
    return [_until_eos(row, eos_ids) for row in out[:, width:].tolist()]


def _processors(
    options: GenerationOptions, seed: int, places: Sequence[int], device: torch.device
) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if options.temperature == 0:
        return processors
    if options.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(options.temperature)))
    if options.top_k:
        processors.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        processors.append(TopPLogitsWarper(options.top_p))
    uniforms = np.stack(
        [generator("sample", seed, place).random(options.max_new_tokens) for place in places]
    )
    processors.append(_KeyedPick(torch.from_numpy(uniforms).to(device)))
    return processors


def _until_eos(ids: list[int], eos_ids: Sequence[int]) -> list[int]:
    ends = [place for place, token in enumerate(ids) if token in eos_ids]
    return ids[: ends[0] + 1] if ends else ids
