"""How image rows are read: part of `alignkit.options`, where everyone imports it from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from alignkit.errors import ConfigError
from alignkit.ranges import finite, positive, share

BadRow = Literal["error", "skip"]
Identical = Literal["skip", "keep", "error"]


@dataclass(frozen=True, kw_only=True)
class ScoreLabels:
    """Preferences between images by their scores instead of by people.

    Attributes:
        folder: of scores, as `alignkit label images` writes it.
        scorer: whose scores count; or scorer -> weight, for a weighted sum.
        soft: whether pairs have p_chosen = sigmoid(difference / temperature); otherwise the image
            of the higher score simply is chosen.
        temperature: in the scores' unit; 1 for PickScore, whose differences are log-odds.
    """

    folder: str
    scorer: str | Mapping[str, float]
    soft: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        positive("data_options.labels", temperature=self.temperature)
        if not self.soft and self.temperature != 1.0:
            raise ConfigError(
                "data_options.labels.temperature turns differences of scores into probabilities, "
                f"which soft=True asks for; got temperature={self.temperature} without it. Add "
                "soft=True, or leave temperature out."
            )
        if not isinstance(self.scorer, str):
            finite("data_options.labels.scorer", **self.scorer)
            object.__setattr__(self, "scorer", MappingProxyType(dict(self.scorer)))


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How image rows are read.

    Attributes:
        resolution: pixels of the square that an image is resized (short side) and cropped to; None
            is the size that the UNet was trained for, 1024 for SDXL. With buckets, the square root
            of their area.
        buckets: take the shape of about that area, sides in multiples of `bucket_step`, that is
            nearest to the images' aspect, instead of a square. The images of a row share one.
        ties: Pick-a-Pic rows without a winner: dropped, kept with p_chosen one half, or refused.
        min_margin: pairs whose scores differ by less (or, without scores, whose `margin` is
            smaller) are left out and counted.
        crop, flip, caption_dropout: drawn per row from (seed, epoch, row id), the same for both
            sides of a pair. Held-out rows are centred, unflipped and keep their captions.
        labels: which image of a pair is chosen, by scores; None believes the data. Held-out rows
            keep the data's.
        latents: the mean of the VAE's posterior, or a sample of it keyed by (seed, epoch, row,
            image).
        held_out_share: of the prompts, kept away from training; `eval_data="split"` evaluates
            their rows.
        part: which of these rows are read.
        eval_draws: timesteps and noises at which each held-out row is evaluated: the same at every
            evaluation, and spread evenly over the timesteps.
        cache: a folder that keeps latents and prompt embeddings for all runs and processes; "auto"
            is this user's own, None keeps them in this run's memory.
        cache_dtype: that they are kept in.
        columns: our column name -> the data's.
    """

    resolution: int | None = None
    buckets: bool = False
    bucket_step: int = 64
    ties: Literal["drop", "half", "error"] = "drop"
    identical_pairs: Identical = "skip"
    min_margin: float | None = None
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    caption_dropout: float = 0.0
    labels: ScoreLabels | None = None
    latents: Literal["mean", "sample"] = "mean"
    held_out_share: float = 0.0
    part: Literal["train", "held_out", "all"] = "train"
    eval_draws: int = 4
    cache: str | None = None
    cache_dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    on_bad_row: BadRow = "error"
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive(
            "data_options",
            resolution=self.resolution,
            bucket_step=self.bucket_step,
            eval_draws=self.eval_draws,
        )
        finite("data_options", min_margin=self.min_margin)
        if not self.buckets and self.bucket_step != 64:
            raise ConfigError(
                "data_options.bucket_step is the step of aspect buckets, which buckets=True asks "
                f"for; got bucket_step={self.bucket_step} without them. Add buckets=True, or leave "
                "bucket_step out."
            )
        share(
            "data_options",
            caption_dropout=self.caption_dropout,
            held_out_share=self.held_out_share,
        )
        object.__setattr__(self, "columns", MappingProxyType(dict(self.columns)))

    def held_out(self) -> ImageOptions:
        """The options of rows that are evaluated, without augmentation and by the data's labels."""
        plain = replace(self, crop="center", flip=False, caption_dropout=0.0, latents="mean")
        return replace(plain, part="all", held_out_share=0.0, labels=None)

    def split(self) -> ImageOptions:
        """The options of the rows of `data` that are evaluated and not trained on."""
        return replace(self.held_out(), part="held_out", held_out_share=self.held_out_share)
