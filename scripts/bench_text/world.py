"""The model, tokenizer and rows of the benchmarks, made from a seed, in a folder.

Lengths are log-normal and in tokens: every word used in the rows is one token of the tokenizer.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class World:
    """The sizes of everything.

    Attributes:
        words: distinct words of the made-up language; the tokenizer is trained on them.
        pairs: rows of a file.
        cap: longest prompt + answer, closing eos included.
        prompt, completion: median lengths of the chat-like rows.
        long_prompt, long_completion: of the rows with long prompts.
    """

    vocabulary: int = 32_000
    hidden: int = 512
    feed_forward: int = 1376
    layers: int = 8
    words: int = 26_000
    pairs: int = 256
    cap: int = 512
    prompt: int = 120
    completion: int = 90
    long_prompt: int = 400
    long_completion: int = 60


FULL = World()
QUICK = World(512, 32, 64, 2, 120, 64, 48, 12, 9, 32, 6)
SPREAD, LONG_SPREAD = 0.6, (0.12, 0.4)
"""Sigma of the logarithm of lengths: of chat-like rows, and of long prompts and their answers."""
EOS, PAD = "<eos>", "<pad>"


def make(root: Path, world: World) -> Path:
    """The folder of `world` under `root`, made unless it is there."""
    folder = root / f"world-{world.hidden}x{world.layers}"
    stamp, wanted = folder / "world.json", json.dumps(asdict(world))
    if stamp.is_file() and stamp.read_text() == wanted:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    words = _words(world.words)
    tokenizer = _tokenizer(words, world.vocabulary)
    single = [w for w in words if len(tokenizer.encode(" " + w, add_special_tokens=False)) == 1]
    _model(world, tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    chat = _pairs(single, world, (world.prompt, SPREAD), (world.completion, SPREAD), seed=1)
    medians = world.long_prompt, world.long_completion
    long = _pairs(single, world, *zip(medians, LONG_SPREAD, strict=True), seed=2)
    _write(folder / "chat.jsonl", chat)
    _write(folder / "long.jsonl", long)
    _write(folder / "labelled.jsonl", _labelled(chat))
    _write(folder / "instructions.jsonl", [_answered(row, "chosen") for row in chat])
    stamp.write_text(wanted)
    return folder


def _words(num: int) -> list[str]:
    """Distinct words of two to four syllables, in random order of lengths."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    rng = random.Random(0)
    found: dict[str, None] = {}
    while len(found) < num:
        found["".join(rng.choices(syllables, k=rng.choice((2, 3, 3, 4))))] = None
    return list(found)


def _tokenizer(words: list[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer that has learnt the words by their Zipf frequencies."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = (f" {word}" * max(1, 1000 // (rank + 1)) for rank, word in enumerate(words))
    inner.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, pad_token=PAD)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}" + EOS + "{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return tokenizer


def _model(world: World, tokenizer: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(2, world.hidden // 64)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=world.vocabulary,
            hidden_size=world.hidden,
            intermediate_size=world.feed_forward,
            num_hidden_layers=world.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _pairs(
    words: list[str], world: World, prompt: tuple, completion: tuple, *, seed: int
) -> list[dict[str, str]]:
    rng = random.Random(seed)

    def draw(median: float, spread: float, limit: int) -> int:
        return max(2, min(limit, round(median * rng.lognormvariate(0, spread))))

    def text(num: int) -> str:
        return "".join(" " + word for word in rng.choices(words, k=num))

    rows = []
    for _ in range(world.pairs):
        asked = draw(*prompt, world.cap - world.cap // 16)
        room = world.cap - asked - 1  # the closing eos
        answers = [text(draw(*completion, room)) for _ in range(2)]
        rows.append({"prompt": text(asked), "chosen": answers[0], "rejected": answers[1]})
    return rows


def _answered(row: dict[str, str], answer: str) -> dict[str, Any]:
    return {"prompt": row["prompt"], "completion": row[answer]}


def _labelled(pairs: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Single answers, liked and disliked in turn."""
    return [
        _answered(row, ("rejected", "chosen")[liked]) | {"label": liked}
        for place, row in enumerate(pairs)
        for liked in [place % 2 == 0]
    ]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
