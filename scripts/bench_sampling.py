#!/usr/bin/env python
"""How fast are answers sampled, beside transformers' own generate on the same model?

    python scripts/bench_sampling.py [--prompts 24] [--answers 4] [--rounds 5] [--new 96]

A Llama of 6 layers, 512 wide, with a vocabulary of 32,000; prompts of 20 to 160 tokens, several
answers to each, which end at a token of any of 1 in 40, or are cut. Both sample at temperature 1
without a filter. The peer takes prompts in the order of the data in batches of 32 rows, as online
trainers do; rounds are interleaved. What is compared is useful tokens (up to the end of each
answer) per second, and positions computed per useful token.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from alignkit.options import GenerationOptions
from alignkit.text.generation import generate

VOCABULARY, BATCH = 32_000, 32
EOS = list(range(0, VOCABULARY, 40))


def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


def ours(lm: Any, asked: Sequence[np.ndarray], new: int, number: int) -> int:
    keys = [(number, place) for place in range(len(asked))]
    found = generate(lm, None, asked, GenerationOptions(max_new_tokens=new), keys, EOS)
    return sum(len(one.ids) for one in found)


def theirs(lm: Any, asked: Sequence[np.ndarray], new: int, number: int) -> int:
    torch.manual_seed(number)
    useful, ends = 0, torch.tensor(EOS)
    config = GenerationConfig(
        max_new_tokens=new, do_sample=True, top_k=0, eos_token_id=EOS, pad_token_id=0
    )
    for start in range(0, len(asked), BATCH):
        rows = asked[start : start + BATCH]
        width = max(map(len, rows))
        ids = torch.zeros((len(rows), width), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, width - len(row) :] = torch.from_numpy(row.astype(np.int64))
            mask[place, width - len(row) :] = 1
        out = lm.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        over = torch.isin(out[:, width:], ends)
        first = torch.where(over.any(-1), over.int().argmax(-1) + 1, over.shape[1])
        useful += int(first.sum())
    return useful


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name, default in (("prompts", 24), ("answers", 4), ("rounds", 5), ("new", 96)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(given)
    lm, draw = model(), np.random.default_rng(0)
    prompts = [
        draw.integers(1, VOCABULARY, int(size)).astype(np.int32)
        for size in draw.integers(20, 160, options.prompts)
    ]
    asked = [prompt for prompt in prompts for _ in range(options.answers)]
    positions = [0]

    def count(module: Any, args: Any, kwargs: Any) -> None:
        positions[0] += kwargs["input_ids"].numel()

    lm.register_forward_pre_hook(count, with_kwargs=True)
    rates: dict[str, list[float]] = {"alignkit": [], "transformers": []}
    spent = dict.fromkeys(rates, 0.0)
    for number in range(options.rounds + 1):
        for name, sample in (("alignkit", ours), ("transformers", theirs)):
            positions[0] = 0
            start = time.process_time()
            useful = sample(lm, asked, options.new, number)
            seconds = time.process_time() - start
            if number:  # the first round warms up
                rates[name].append(useful / seconds)
                spent[name] = positions[0] / useful
    for name, values in rates.items():
        told = f"{median(values):8.1f} useful tokens per CPU second"
        print(f"{name:14} {told}, {spent[name]:.2f} positions computed per token")
    ratios = sorted(a / b for a, b in zip(*rates.values(), strict=True))
    print(f"{median(ratios):.2f}x (rounds: {', '.join(f'{one:.2f}' for one in ratios)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
