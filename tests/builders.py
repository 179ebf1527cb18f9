"""Small models and rows that tests make for themselves, in the formats that users have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from alignkit.batches import Batch, Likelihood
from alignkit.losses import PREFERENCE_LOSSES, PairScores
from alignkit.objectives.criterion import Criterion
from alignkit.objectives.preference import PreferenceObjective
from alignkit.options import LoRA
from alignkit.reference import FrozenModel
from alignkit.sources import RowSource
from alignkit.text.wing import TextWing
from alignkit.text.wing import build as build_text

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


def token_rows(num: int = 8, *, seed: int = 0, low: int = 4) -> list[dict[str, Any]]:
    """Preference rows of uneven lengths as token ids, none below `low`."""
    draw = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(low, VOCABULARY, (length,), generator=draw).tolist()

    return [
        {
            "prompt_ids": ids(2 + i % 4),
            "chosen_ids": ids(1 + (3 * i) % 7),
            "rejected_ids": ids(2 + (5 * i) % 6),
        }
        for i in range(num)
    ]


def pair_scores(
    chosen: Any, rejected: Any, *, dtype: torch.dtype = torch.float64, **more: Any
) -> PairScores:
    """Pairs with the given log-ratios of chosen and rejected, against a reference of zeros."""

    def vector(value: Any) -> torch.Tensor:
        return torch.as_tensor(value, dtype=dtype).reshape(-1)

    w, ell = vector(chosen), vector(rejected)
    given = {name: vector(value).expand_as(w) for name, value in more.items() if value is not None}
    return PairScores(w, ell, torch.zeros_like(w), torch.zeros_like(ell), **given)


ONE_PROCESS = SimpleNamespace(rank=0, size=1, sum=lambda value: value, gather=lambda value: value)
"""The `Collective` of a single process."""


@dataclass(frozen=True)
class Cells:
    """Content of a batch whose answers are cells of a table."""

    cells: tuple[int, ...]

    def select(self, groups: Sequence[int], answers: Sequence[int]) -> Cells:
        return Cells(tuple(self.cells[a] for a in answers))


class Table(nn.Module):
    """The smallest likelihood module there is: one trained log-likelihood per answer."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.logps = nn.Parameter(values.clone())

    def forward(
        self, batch: Batch, draw: Any = None, want: frozenset[str] = frozenset()
    ) -> Likelihood:
        total = self.logps[torch.tensor(batch.content.cells)]
        return Likelihood(total, torch.ones_like(total))


class TableBackend:
    """Pair i is cells 2i (chosen) and 2i + 1 (rejected)."""

    def __init__(self, values: torch.Tensor) -> None:
        self.module: nn.Module = Table(values)

    def draw(self, batch: Batch, key: Any) -> None:
        return None

    def split(self, batch: Batch, budget: int | str) -> list[Batch]:
        size = batch.num_groups if budget == "auto" else int(budget)
        return [
            batch.select(range(s, min(s + size, batch.num_groups)))
            for s in range(0, batch.num_groups, size)
        ]


class TableExamples:
    """`num` pairs of a table, as `Examples`; remembers which (row, epoch) were asked for."""

    skipped: ClassVar[dict[str, int]] = {}
    labels: ClassVar[Any] = None

    def __init__(self, num: int, weight: Sequence[float] | None = None) -> None:
        self.num = num
        self.weight = None if weight is None else torch.tensor(weight)
        self.asked: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return self.num

    def fingerprint(self) -> str:
        return str(self.num)

    def collate(self, indices: Sequence[int], epochs: Sequence[int]) -> Batch:
        self.asked += zip(indices, epochs, strict=True)
        rows = list(indices)
        return Batch(
            content=Cells(tuple(cell for i in rows for cell in (2 * i, 2 * i + 1))),
            group=torch.arange(2 * len(rows)) // 2,
            rank=torch.arange(2 * len(rows)) % 2,
            position=torch.arange(len(rows)),
            row_id=torch.tensor(rows),
            weight=None if self.weight is None else self.weight[rows],
        )


def table_source(num: int, batch_size: int, **options: Any) -> RowSource:
    made = TableExamples(num, options.pop("weight", None))
    examples = options.pop("examples", made)
    given = {"epochs": 1, "seed": 0, "processes": ONE_PROCESS, **options}
    return RowSource(examples, batch_size=batch_size, **given)


def table_objective(
    num: int, *, loss: Any = PREFERENCE_LOSSES["sigmoid"], beta: float = 0.1, **options: Any
) -> PreferenceObjective:
    """Preference optimisation of a table that starts at its reference."""
    draw = torch.Generator().manual_seed(1)
    backend = TableBackend(torch.randn(2 * num, generator=draw) - 10)
    reference = FrozenModel.copy_of(backend.module)
    criterion = Criterion.of(loss, beta=beta, **options.pop("keywords", {}))
    return PreferenceObjective(backend, reference, criterion, **options)


def text_wing(
    architecture: str = "llama", adapter: LoRA | None = None, *, dropout: float = 0.0, **tok: Any
) -> TextWing:
    """A tiny text wing; its model was handed over in train mode."""
    model = tiny_lm(architecture, dropout=dropout).train()
    return build_text((model, tiny_tokenizer(**tok)), adapter=adapter)


def move(module: nn.Module, scale: float = 0.05) -> None:
    """Take the trained parameters somewhere else, always to the same place."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=draw)


def loss_and_gradients(
    objective: PreferenceObjective, batch: Batch
) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss over a global batch and its gradients, added up over micro-batches."""
    module = objective.backend.module
    module.zero_grad(set_to_none=True)
    normaliser, loss = float(objective.normaliser(batch)), 0.0
    for micro in objective.micro_batches(batch, step=1):
        total, _ = objective(micro)
        (total / normaliser).backward()
        loss += total.item() / normaliser
    gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return loss, gradients
