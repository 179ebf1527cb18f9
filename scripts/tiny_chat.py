"""Train the tiny chat model that ships with alignkit and write it in the Hugging Face format.

    python scripts/tiny_chat.py OUT

The model learns the tiny chat world (``alignkit.demo.chat_world``) from fresh samples: answers in
styles that have nothing to do with what the prompt asked for, and critiques, revisions, verdicts
and scores. One seed and one thread give the same folder again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignkit.demo.chat_world import (
    draw_prompt,
    draw_style,
    feedback_example,
    make_answer,
)

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SYSTEM = "You are a helpful assistant."
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{%- else -%}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
#: Shares of the examples: half of the training tokens are answers, half are feedback.
MIX = {"answer": 58, "critique": 8, "revise": 10, "verdict": 16, "score": 8}
BATCH_TOKENS = 4096
POOL = 8192  # examples drawn at once, then grouped by length to save padding
PROMPT_WEIGHT = 0.1  # the prompt's own tokens teach the words of the world
DIGIT_WEIGHT = 4.0  # a verdict or score is a single token that must not drown


def draw_turns(rng: random.Random) -> tuple[str, str]:
    """A user text and the reply to learn."""
    task = rng.choices(tuple(MIX), weights=tuple(MIX.values()))[0]
    if task == "answer":
        prompt = draw_prompt(rng, "train")
        return prompt.text, make_answer(prompt, draw_style(rng, prompt), rng)
    example = feedback_example(task, rng, "train")
    return example.user, example.reply


def train_tokenizer(seed: int, vocab_size: int = 1400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which nearly every word of the world is one token."""
    rng = random.Random(f"tokenizer-{seed}")
    texts = (text for _ in range(20_000) for text in draw_turns(rng))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained Llama of about 1.4 million parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of token ids and loss weights, padded on the right."""
    rng = random.Random(f"train-{seed}")
    while True:
        pool = []
        for user, reply in (draw_turns(rng) for _ in range(POOL)):
            head = f"<|system|>{SYSTEM}{END}" if rng.random() < 0.1 else ""
            pool.append((f"{head}<|user|>{user}{END}<|assistant|>", f"{reply}{END}"))
        prompts = tokenizer([p for p, _ in pool], add_special_tokens=False)["input_ids"]
        replies = tokenizer([r for _, r in pool], add_special_tokens=False)["input_ids"]
        rows = sorted(zip(prompts, replies, strict=True), key=lambda r: len(r[0]) + len(r[1]))
        groups, group = [], []
        for row in rows:
            group.append(row)
            if len(group) * (len(row[0]) + len(row[1])) >= BATCH_TOKENS:
                groups.append(group)
                group = []
        rng.shuffle(groups)
        for group in groups:
            yield _collate(group, tokenizer.pad_token_id)


def _collate(
    rows: list[tuple[list[int], list[int]]], pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(p) + len(r) for p, r in rows)
    ids = torch.full((len(rows), width), pad)
    weights = torch.zeros(len(rows), width)
    for i, (prompt, reply) in enumerate(rows):
        end = len(prompt) + len(reply)
        ids[i, :end] = torch.tensor(prompt + reply)
        weights[i, : len(prompt)] = PROMPT_WEIGHT
        weights[i, len(prompt) : end] = 1.0
        if len(reply) == 2:
            weights[i, len(prompt)] = DIGIT_WEIGHT
    return ids, weights


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    steps: int,
    peak_lr: float = 2e-3,
) -> float:
    """Train with AdamW on a cosine schedule; gives back the mean loss of the last 100 steps."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.05
    )
    start, losses = time.monotonic(), []
    for step, (ids, weights) in zip(range(steps), batches(tokenizer, seed), strict=False):
        warm = min(1.0, (step + 1) / 150)
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * warm * (0.01 + 0.99 * cosine)
        # Padding stands on the right and carries no weight, so causal attention needs no mask.
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        token_loss = F.cross_entropy(
            logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        weight = weights[:, 1:].flatten()
        loss = (token_loss * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        reply = weight > PROMPT_WEIGHT
        losses.append(token_loss[reply].mean().item())
        if (step + 1) % 100 == 0:
            recent = sum(losses[-100:]) / 100
            seconds = time.monotonic() - start
            print(f"step {step + 1}/{steps}  reply loss {recent:.4f}  {seconds:.0f} s", flush=True)
    return sum(losses[-100:]) / len(losses[-100:])


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out_dir: Path) -> None:
    """Write the folder: float16 weights that load as float32."""
    out_dir.mkdir(parents=True, exist_ok=True)
    generation = model.generation_config
    generation.eos_token_id = tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    generation.bos_token_id = None
    model.half().save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    path = out_dir / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")


def make(out_dir: Path, seed: int = 0, steps: int = 3600) -> float:
    """Train tokenizer and model and write them to ``out_dir``; gives back the final loss."""
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(seed)
    model = build_model(tokenizer, seed)
    loss = train(model, tokenizer, seed, steps)
    save(model, tokenizer, Path(out_dir))
    return loss


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3600)
    args = parser.parse_args()
    print(f"final reply loss {make(args.out, args.seed, args.steps):.4f}")


if __name__ == "__main__":
    main()
