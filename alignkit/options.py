"""Every option a user can set, as frozen dataclasses. The YAML has the same keys.

This file imports nothing heavy: the CLI reads it to answer at once. Each class checks what it can
by itself when it is made; combinations are checked in `alignkit.config`, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from alignkit.errors import ConfigError
from alignkit.generation_options import GenerationOptions as GenerationOptions
from alignkit.image_options import BadRow, Identical
from alignkit.image_options import ImageOptions as ImageOptions
from alignkit.image_options import ScoreLabels as ScoreLabels
from alignkit.ranges import finite, list_of_names, not_negative, positive, share


@dataclass(frozen=True)
class EarlyStop:
    """Stop when an evaluation's `metric` has not improved for `patience` evaluations.

    Attributes:
        metric: its name, such as "eval/loss" or, of a named set, "eval/hard/rewards/accuracies".
        patience: evaluations without improvement.
        mode: which direction is better; "auto" is "min" for names that end in "loss".
    """

    metric: str
    patience: int = 3
    mode: Literal["auto", "max", "min"] = "auto"

    def __post_init__(self) -> None:
        positive("EarlyStop", patience=self.patience)


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """How the optimizer runs; the same for every method and modality.

    Attributes:
        max_steps: optimizer steps.
        epochs: passes over offline data. With neither given, one epoch; both together are refused.
        batch_size: examples (pairs, groups) one optimizer step sees in total, over all processes
            and accumulation. Batches run on across epochs; no row is dropped.
        micro_batch: examples per forward, or "auto" by a token or pixel budget.
        shuffle: rows in a new order every epoch, from the seed; False keeps the data's order.
        learning_rate: None takes the default of the method and wing, which is printed.
        warmup: a share of all steps (float below 1) or a number of steps (int).
        precision: "auto" is bf16 on GPUs that have it and fp32 elsewhere. What is trained always
            keeps float32 master values.
        gradient_checkpointing: "auto" is off on CPUs; on GPUs it is on for text, and for images
            where one pair would not fit without.
        ema: decay of a moving average of what is trained, in [0, 1), such as 0.9999: it is
            evaluated, sampled from and kept in place of the last weights, of which it is one more
            float32 copy.
            Early on it forgets faster: min(ema, (1 + step) / (10 + step)).
        channels_last: convolutions with channels innermost in memory, as fast GPU kernels want
            them. "auto" does so for images on GPUs. Images only.
        sharding: what is trained, and frozen references, sharded over the processes: "fsdp2" by
            torch, "zero3" by DeepSpeed. Text only; neither run on real hardware.
        save_every: steps between checkpoints; None saves none but the finished model.
        keep_best: name of an evaluation metric, such as "eval/rewards/accuracies"; the best
            checkpoint is kept beside the newest ones.
        router_aux_loss_coef: weight of the load-balancing loss of a mixture of experts, over the
            real tokens of each micro-batch; "model" is the weight in the model's config.
        trackers: accelerate's tracker names, such as "tensorboard" or "wandb".
    """

    max_steps: int | None = None
    epochs: float | None = None
    batch_size: int = 64
    micro_batch: int | Literal["auto"] = "auto"
    shuffle: bool = True
    learning_rate: float | None = None
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: float | int = 0.1
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    compile: bool = False
    channels_last: bool | Literal["auto"] = "auto"
    ema: float | None = None
    sharding: Literal["none", "fsdp2", "zero3"] = "none"
    log_every: int = 10
    eval_every: int | None = None
    sample_every: int | None = None
    save_every: int | None = None
    keep_checkpoints: int = 2
    keep_best: str | None = None
    early_stop: EarlyStop | None = None
    trackers: tuple[str, ...] = ()
    push_to_hub: str | None = None
    router_aux_loss_coef: float | Literal["model"] | None = None

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.epochs is not None:
            raise ConfigError(
                "trainer.max_steps and trainer.epochs say the same thing twice; got "
                f"max_steps={self.max_steps} and epochs={self.epochs}. Give one of them."
            )
        lengths = ("max_steps", "epochs", "batch_size", "max_grad_norm", "learning_rate")
        cadences = ("log_every", "eval_every", "sample_every", "save_every", "keep_checkpoints")
        positive("trainer", **{name: getattr(self, name) for name in lengths + cadences})
        finite("trainer", epochs=self.epochs, learning_rate=self.learning_rate)
        if self.micro_batch != "auto":
            positive("trainer", micro_batch=self.micro_batch)
        if self.ema is not None:
            share("trainer", ema=self.ema)
            if self.ema == 1:
                raise ConfigError("trainer.ema must be below 1, where the average never moves.")
        if self.router_aux_loss_coef != "model":
            not_negative("trainer", router_aux_loss_coef=self.router_aux_loss_coef)
        not_negative("trainer", warmup=self.warmup, weight_decay=self.weight_decay)
        if isinstance(self.warmup, float) and self.warmup > 1:
            raise ConfigError(
                "trainer.warmup as a float is a share of all steps, at most 1.0; got "
                f"{self.warmup}. "
                f"For {self.warmup:g} steps write the integer {int(self.warmup)}."
            )
        for name in ("keep_best", "early_stop"):
            if getattr(self, name) is not None and self.eval_every is None:
                raise ConfigError(
                    f"trainer.{name} chooses by an evaluation, and there is none; "
                    "set trainer.eval_every and eval_data."
                )
        object.__setattr__(self, "trackers", list_of_names("trainer.trackers", self.trackers))


MARGINS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "small": {
            "significantly better": 1.0,
            "better": 2 / 3,
            "slightly better": 1 / 3,
            "negligibly better": 0.0,
            "unsure": 0.0,
        },
        "large": {
            "significantly better": 3.0,
            "better": 2.0,
            "slightly better": 1.0,
            "negligibly better": 0.0,
            "unsure": 0.0,
        },
    }
)
"""Llama 2's margins (Touvron et al. 2023, 2307.09288, table 27) of how much better an answer is."""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How text rows are read.

    Attributes:
        max_length: longest prompt + completion in tokens.
        truncation: longer rows: "keep_start" cuts the answers' ends, "keep_end" the prompt's start,
            counted and warned of; "split" makes several of a long `text` (SFT); "error" makes them
            bad rows, as is in any mode a prompt without room for an answer.
        packing: how answers share a forward. "prefix" is one row without padding, each prompt once
            for all of its answers; "varlen" is one row with a prompt to each answer; "bucket" pads,
            and sorts a batch by length so that little is padded; "none" pads in the data's order.
            All give the same numbers. "auto" is "prefix" where the model passes a trial at start,
            else padded, sorted where micro_batch is "auto".
        attention: what computes packed rows: "varlen" (FlashAttention or cuDNN by lengths), "flex"
            (flex attention with a mask by blocks), both for GPUs and not run on real hardware;
            "plain" is torch's attention sequence by sequence, on CPUs its flash kernel. "auto" is
            the first of them that passes a trial at start.
        on_bad_row: what happens to rows that cannot be used: "error", or "skip" (counted).
        identical_pairs: pairs whose two answers are the same teach nothing; skipped and counted.
        streaming: rows are read and tokenised while the model trains, so that they need not fit
            into memory; then `max_steps` says when to stop. "auto" streams files of 2 GiB or more
            and what has no length, such as a `datasets.IterableDataset`.
        shuffle_buffer: rows that are shuffled together when they are streamed.
        margins: what a pair's `margin` in words ("significantly better", "better", "slightly
            better", "negligibly better", "unsure") is worth: Llama 2's "small" margins, 1 to 0, or
            its "large" ones, 3 to 0. Without it margins are numbers.
        columns: our column name -> the data's.
    """

    max_length: int = 1024
    truncation: Literal["keep_start", "keep_end", "error", "split"] = "keep_start"
    packing: Literal["auto", "prefix", "varlen", "bucket", "none"] = "auto"
    attention: Literal["auto", "varlen", "flex", "plain"] = "auto"
    on_bad_row: BadRow = "error"
    identical_pairs: Identical = "skip"
    streaming: bool | Literal["auto"] = "auto"
    shuffle_buffer: int = 10_000
    margins: Literal["small", "large"] | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive("data_options", max_length=self.max_length, shuffle_buffer=self.shuffle_buffer)
        if self.attention != "auto" and self.packing in ("bucket", "none"):
            raise ConfigError(
                f"data_options.attention={self.attention!r} computes packed rows, and "
                f"packing={self.packing!r} pads them. Leave one of them out."
            )
        object.__setattr__(self, "columns", MappingProxyType(dict(self.columns)))

    def held_out(self) -> TextOptions:
        """The options of rows that are evaluated: those are few, and read as a whole."""
        return replace(self, streaming=False)

    @property
    def eval_draws(self) -> int:
        """Text has no draw to repeat."""
        return 1


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """A low-rank adapter (Hu et al. 2021, 2106.09685): W + (alpha / rank) B A.

    Attributes:
        alpha: None means equal to rank, so that the update's scale is 1.
        targets: "auto" is all linear layers of the blocks for text and attention + feed-forward for
            images; or "attention", "attention+ff", "all", or module names.
        kind: "lora", "dora" (2402.09353) or "rslora" (2312.03732; scale alpha / sqrt(rank)).
        continue_from: an adapter folder to go on from. The reference is then that adapter's start.
        quantization: "4bit" stores the base under the adapter as NF4 (QLoRA, 2305.14314). Language
            models from a folder or the hub, on CUDA with bitsandbytes; not run on real hardware.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | Sequence[str] = "auto"
    kind: Literal["lora", "dora", "rslora"] = "lora"
    continue_from: str | None = None
    quantization: Literal["4bit"] | None = None

    def __post_init__(self) -> None:
        positive("adapter", rank=self.rank, alpha=self.alpha)
        share("adapter", dropout=self.dropout)
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
