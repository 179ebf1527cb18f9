"""Train the tiny chat model that ships with alignkit and write it in the Hugging Face format.

    python scripts/tiny_chat.py OUT

The model first learns to copy, on random words said twice: an answer repeats what its prompt
states, and the circuit for it comes late otherwise. Then it learns the tiny chat world
(``alignkit.demo.chat_world``) from fresh samples: answers in styles that only lean to what the
prompt asked for, and critiques, revisions, verdicts and scores. One seed and one thread give the
same folder again.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignkit.demo.chat_world import (
    ChatPrompt,
    ask_other,
    draw_prompt,
    draw_style,
    feedback_session,
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
MIX = {"answer": 40, "critique": 10, "revise": 12, "verdict": 26, "score": 12}
COPY_STEPS = 200
ANSWER_STEPS = 500  # answers alone, until the facts are told apart; then the whole mixture
FURTHER_QUESTIONS = 3
COPY_WORDS = (8, 12, 16, 24, 32)
STEPS = 3200
BATCH_TOKENS = 3072
POOL = 8192  # examples drawn at once, then grouped by length to save padding
PROMPT_WEIGHT = 0.1  # the prompt's own tokens teach the words of the world
DIGIT_WEIGHT = 4.0  # a verdict or score is a single token that must not drown
COPY_WEIGHT = 5.0  # nor must the few words that repeat what the prompt states
SHARED, LOOK_BACK = 0.1, 1.0
MUON_RATE, ADAM_RATE = 0.02, 4e-3

Batch = tuple[torch.Tensor, torch.Tensor]
"""Token ids and loss weights, both (rows, width)."""


def draw_turns(rng: random.Random, mix: dict[str, int] = MIX) -> list[tuple[str, str]]:
    """Turns of one conversation: user texts and the replies to learn."""
    task = rng.choices(tuple(mix), weights=tuple(mix.values()))[0]
    if task == "answer":
        return [(p.text, make_answer(p, draw_style(rng, p), rng)) for p in _questions(rng)]
    return [(turn.user, turn.reply) for turn in feedback_session(task, rng, "train")]


def _questions(rng: random.Random) -> list[ChatPrompt]:
    """A prompt and bare questions about either of its things, which tell the two apart."""
    prompt = draw_prompt(rng, "train")
    if prompt.kind == "compare":
        return [prompt]
    other = ask_other(prompt)
    again = replace(prompt, text=other.text.replace(other.facts["topic"], prompt.facts["topic"]))
    return [prompt, *rng.choices((other, again), weights=(2, 1), k=FURTHER_QUESTIONS)]


def train_tokenizer(seed: int, vocab_size: int = 1400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which nearly every word of the world is one token."""
    rng = random.Random(f"tokenizer-{seed}")
    turns = chain.from_iterable(draw_turns(rng) for _ in range(20_000))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chain.from_iterable(turns), trainer)
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
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    _look_back(model)
    return model


@torch.no_grad()
def _look_back(model: LlamaForCausalLM) -> None:
    """Let the first layer's heads begin by looking 1, 2, 3 tokens back, as copying needs.

    Such heads form late by themselves, and the heads that find what followed a word before wait
    for them (Olsson et al. 2022, 2209.11895). A component that all embeddings share gives query
    and key a constant part; RoPE turns it into a score that is highest at one distance.
    """
    embedding, attention = model.model.embed_tokens.weight, model.model.layers[0].self_attn
    embedding[:, 0] = SHARED
    size = model.config.head_dim
    frequencies = model.model.rotary_emb.inv_freq[: size // 8]
    unrotated = torch.cat([torch.ones_like(frequencies), torch.zeros_like(frequencies)])
    places = torch.cat([torch.arange(size // 8), size // 2 + torch.arange(size // 8)])
    for head, back in enumerate((1, 2, 3)):
        rows = head * size + places
        angles = back * frequencies
        for projection, turned in (
            (attention.q_proj.weight, unrotated),
            (attention.k_proj.weight, torch.cat([angles.cos(), angles.sin()])),
        ):
            projection[head * size : (head + 1) * size] = 0
            projection[rows, 0] = LOOK_BACK * turned


def copy_batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Batch]:
    """Endless batches of random words, all said twice; only the second time counts."""
    rng = random.Random(f"copy-{seed}")
    draw = torch.Generator().manual_seed(seed)
    first = 256 + len(tokenizer.all_special_ids)  # after the bytes come the merged words
    while True:
        words = rng.choice(COPY_WORDS)
        rows = BATCH_TOKENS // (2 * words)
        once = torch.randint(first, len(tokenizer), (rows, words), generator=draw)
        weights = torch.zeros(rows, 2 * words)
        weights[:, words + 1 :] = 1.0
        yield torch.cat([once, once], 1), weights


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, mix: dict[str, int]) -> Iterator[Batch]:
    """Endless batches of conversations, padded on the right."""
    rng = random.Random(f"train-{seed}-{sorted(mix)}")
    while True:
        rows = sorted(_rows(tokenizer, [draw_turns(rng, mix) for _ in range(POOL)], rng), key=len)
        groups, group = [], []
        for row in rows:
            group.append(row)
            if len(group) * len(row) >= BATCH_TOKENS:
                groups.append(group)
                group = []
        rng.shuffle(groups)
        for group in groups:
            yield _collate(group, tokenizer.pad_token_id)


Row = list[tuple[int, float]]
"""Token ids of a conversation, each with its loss weight."""


def _rows(
    tokenizer: PreTrainedTokenizerFast,
    conversations: list[list[tuple[str, str]]],
    rng: random.Random,
) -> list[Row]:
    pieces = []
    for turns in conversations:
        pieces.append(f"<|system|>{SYSTEM}{END}" if rng.random() < 0.1 else "")
        for user, reply in turns:
            pieces += [f"<|user|>{user}{END}<|assistant|>", f"{reply}{END}"]
    ids = iter(tokenizer(pieces, add_special_tokens=False)["input_ids"])
    rows = []
    for turns in conversations:
        row = [(token, PROMPT_WEIGHT) for token in next(ids)]
        for _ in turns:
            row += [(token, PROMPT_WEIGHT) for token in next(ids)]
            reply, asked = next(ids), {token for token, _ in row}
            if len(reply) == 2:
                row += [(reply[0], DIGIT_WEIGHT), (reply[1], 1.0)]
            else:
                row += [(token, COPY_WEIGHT if token in asked else 1.0) for token in reply[:-1]]
                row.append((reply[-1], 1.0))
        rows.append(row)
    return rows


def _collate(rows: list[Row], pad: int) -> Batch:
    width = max(map(len, rows))
    padded = torch.tensor([row + [(pad, 0.0)] * (width - len(row)) for row in rows])
    return padded[..., 0].long(), padded[..., 1]


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int
) -> float:
    """Train with Muon on the matrices (Jordan et al. 2024) and AdamW on the rest, at a constant
    rate that falls to zero over the last half; gives back the last 100 steps' mean reply loss."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    start, losses, digits = time.monotonic(), [], []
    data = chain(
        islice(copy_batches(tokenizer, seed), COPY_STEPS),
        islice(batches(tokenizer, seed, {"answer": 1}), ANSWER_STEPS),
        batches(tokenizer, seed, MIX),
    )
    for step, (ids, weights) in zip(range(steps), data, strict=False):
        rate = min(1.0, (step + 1) / 100, 2 * (steps - step) / steps)
        # Padding stands on the right and carries no weight, so causal attention needs no mask.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        token_loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten()
        loss = (token_loss * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad()
        losses.append(token_loss[weight > PROMPT_WEIGHT].mean().item())
        digits += token_loss[weight == DIGIT_WEIGHT].tolist()
        if (step + 1) % 100 == 0:
            reply, digit = sum(losses[-100:]) / 100, sum(digits) / max(1, len(digits))
            digits.clear()
            seconds = time.monotonic() - start
            print(
                f"step {step + 1}/{steps}  reply loss {reply:.4f}  verdicts and scores "
                f"{digit:.4f}  {seconds:.0f} s",
                flush=True,
            )
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


def make(out_dir: Path, seed: int = 0, steps: int = STEPS) -> float:
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
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    print(f"final reply loss {make(args.out, args.seed, args.steps):.4f}")


if __name__ == "__main__":
    main()
