"""Preference optimisation from data: of pairs and rankings, and of single labelled answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from alignkit.errors import ConfigError
from alignkit.methods.common import Timesteps, TimestepWeighting, as_timesteps, fill, shown
from alignkit.ranges import not_negative, share

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha"]


@dataclass(frozen=True, init=False, repr=False)
class DPO:
    """Direct preference optimisation and its family: one offline phase on preference pairs, or on
    rankings of K answers.

    Rafailov et al. 2023 (2305.18290) for text; Wallace et al. 2023 (2311.12908) for images.

    Attributes:
        loss: a name of `alignkit.losses.PREFERENCE_LOSSES` (pairs) or `GROUP_LOSSES` (rankings); a
            mapping from such names to weights, whose weighted sum is MPO; or a function
            `(scores: PairScores, *, beta) -> (B,)` of your own.
        beta: strength of the KL to the reference; None takes that loss's default for the wing,
            which is printed. Text: per nat of the summed log-ratio. Images: the convention of
            Wallace et al., mean squared error with one half (5000 for SDXL at 1024 px); with
            timestep_weighting "nats" as for text.
        divergence: what holds the policy to the reference (Wang et al. 2023, 2309.16240).
        divergence_alpha: of the alpha divergence, between 0 and 1.
        weighting: "wpo" weighs pairs by how likely the policy is to write them (Zhou et al. 2024,
            2406.11827). Text pairs only.
        ld_alpha: LD-DPO (Liu et al. 2024, 2409.06411): the weight, in [0, 1], of the tokens that
            the longer answer has beyond the shorter one. None is 1. Text only.
        anchor: weight of the negative log-likelihood per token of the chosen answer, the term of
            RPO (Pang et al. 2024, 2404.19733); of images half the chosen one's error.
        timestep_weighting: how the errors of an image weigh over timesteps: "uniform" as published,
            "min_snr" (Hang et al. 2023, 2303.09556), "elbo" (the exact weights of the ELBO, clipped
            and normalised to mean 1), or "nats", where the log-ratio is the ELBO's itself, for
            losses and divergences that want nats. Images only.
        timesteps: those that an image model is trained at: "turbo" for models distilled to four
            steps (249, 499, 749, 999, on the schedule ended in pure noise, as the authors' script
            has it), or a list; None is all. Images only.
        safeguard: SDPO (2511.03317): mu in [0, 1) holds the rejected image's gradient back where it
            would raise the chosen one's error; 0.6 there. Image pairs only.
        keywords: the losses' own options, such as `label_smoothing`.
    """

    name: ClassVar[str] = "dpo"
    paper: ClassVar[str] = (
        "Rafailov et al. 2023, arXiv:2305.18290; images: Wallace et al. 2023, arXiv:2311.12908"
    )
    online: ClassVar[bool] = False
    needs: ClassVar[str] = "pairs: prompt, chosen, rejected; or rankings: prompt, responses"

    loss: str | Mapping[str, float] | Callable[..., Any] = "sigmoid"
    beta: float | None = None
    divergence: Divergence = "reverse_kl"
    divergence_alpha: float = 0.5
    weighting: Literal["wpo"] | None = None
    ld_alpha: float | None = None
    anchor: float = 0.0
    timestep_weighting: TimestepWeighting = "uniform"
    timesteps: Timesteps = None
    safeguard: float | None = None
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def __init__(
        self,
        loss: str | Mapping[str, float] | Callable[..., Any] = "sigmoid",
        beta: float | None = None,
        *,
        divergence: Divergence = "reverse_kl",
        divergence_alpha: float = 0.5,
        weighting: Literal["wpo"] | None = None,
        ld_alpha: float | None = None,
        anchor: float = 0.0,
        timestep_weighting: TimestepWeighting = "uniform",
        timesteps: Timesteps = None,
        safeguard: float | None = None,
        **keywords: Any,
    ) -> None:
        fill(
            self,
            keywords,
            loss=loss,
            beta=beta,
            divergence=divergence,
            divergence_alpha=divergence_alpha,
            weighting=weighting,
            ld_alpha=ld_alpha,
            anchor=anchor,
            timestep_weighting=timestep_weighting,
            timesteps=as_timesteps(timesteps),
            safeguard=safeguard,
        )
        not_negative("method", anchor=anchor)
        share("method", **({} if ld_alpha is None else {"ld_alpha": ld_alpha}))
        share("method", **({} if safeguard is None else {"safeguard": safeguard}))
        if safeguard == 1:
            raise ConfigError("method.safeguard must be below 1, where no rejected image counts.")

    def __repr__(self) -> str:
        return shown(self)


@dataclass(frozen=True, init=False, repr=False)
class KTO:
    """Preference optimisation from single answers that are labelled good or bad.

    Ethayarajh et al. 2024 (2402.01306); for images Li et al. 2024 (2404.04465).

    Attributes:
        loss: a name of `alignkit.losses.UNPAIRED_LOSSES`, or a function
            `(scores: UnpairedScores, *, beta) -> (B,)` of your own.
        beta: as in `DPO`.
        desirable_weight, undesirable_weight: what an answer of each class counts. The paper wants
            desirable_weight * (number of good) / (undesirable_weight * (number of bad)) in
            [1, 4/3].
        timestep_weighting, timesteps: as in `DPO`.
        keywords: the loss's own options, such as `momentum`.
    """

    name: ClassVar[str] = "kto"
    paper: ClassVar[str] = (
        "Ethayarajh et al. 2024, arXiv:2402.01306; images: Li et al. 2024, arXiv:2404.04465"
    )
    online: ClassVar[bool] = False
    needs: ClassVar[str] = "single labelled answers: prompt, completion, label"

    loss: str | Callable[..., Any] = "kto"
    beta: float | None = None
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    timestep_weighting: TimestepWeighting = "uniform"
    timesteps: Timesteps = None
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def __init__(
        self,
        loss: str | Callable[..., Any] = "kto",
        beta: float | None = None,
        *,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        timestep_weighting: TimestepWeighting = "uniform",
        timesteps: Timesteps = None,
        **keywords: Any,
    ) -> None:
        fill(
            self,
            keywords,
            loss=loss,
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            timestep_weighting=timestep_weighting,
            timesteps=as_timesteps(timesteps),
        )
        not_negative(
            "method", desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
        )

    def __repr__(self) -> str:
        return shown(self)
