"""Small models and rows that tests make for themselves, in the formats that users have."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

TEXT = [
    "What is the colour of the sky over the old harbour? The sky is blue and grey in the evening.",
    "Name an animal that lives in the forest. The red fox lives in the forest near the river.",
    "How do I make tea? Boil fresh water, wait a little, and pour it over the leaves.",
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 384


def tiny_tokenizer(*, pad: str = "<pad>", bos: bool = False, chat: bool = True) -> Any:
    """A byte-level BPE tokenizer with a ChatML template; `pad="<|im_end|>"` makes pad equal eos."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXT * 3, trainer)
    if bos:
        from tokenizers.processors import TemplateProcessing

        inner.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", inner.token_to_id("<bos>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token=pad,
        bos_token="<bos>" if bos else None,
    )
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_lm(architecture: str = "qwen2", *, seed: int = 0, dropout: float = 0.0) -> Any:
    """A randomly initialised causal LM: "llama", "qwen2" (tied embeddings) or "gpt2"."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=VOCABULARY,
                    n_positions=256,
                    n_embd=32,
                    n_layer=2,
                    n_head=4,
                    resid_pdrop=dropout,
                    embd_pdrop=dropout,
                    attn_pdrop=dropout,
                    bos_token_id=1,
                    eos_token_id=3,
                )
            )
        sizes: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "attention_dropout": dropout,
            "bos_token_id": 1,
            "eos_token_id": 3,
            "pad_token_id": 0,
        }
        if architecture == "llama":
            return LlamaForCausalLM(LlamaConfig(**sizes))
        return Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True))


def pair_rows(num: int = 16, *, chat: bool = True) -> list[dict[str, Any]]:
    """Preference rows of uneven lengths."""
    rows = []
    for i in range(num):
        prompt = "What is the colour of the sky? " * (i % 3 + 1)
        chosen = f"The sky is blue {'and grey ' * (i % 4)}in the evening, number {i}."
        rejected = "Name an animal" + " again" * (i % 5) + "."
        if chat:
            rows.append(
                {
                    "prompt": [{"role": "user", "content": prompt.strip()}],
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                }
            )
        else:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows
