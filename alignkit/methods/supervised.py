"""Supervised fine-tuning: learning from demonstrations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from alignkit.errors import ConfigError
from alignkit.methods.common import Timesteps, TimestepWeighting, as_timesteps, shown
from alignkit.ranges import finite, positive

LossOn = Literal["completion", "all", "assistant"]


@dataclass(frozen=True, repr=False)
class SFT:
    """Supervised fine-tuning: the likelihood of given answers is raised, and there is no reference.

    Ouyang et al. 2022 (2203.02155), step 1, for text. For images the denoising loss on the chosen
    (or only) image of each row, as in Rombach et al. 2022 (2112.10752).

    Attributes:
        loss: a name of `alignkit.losses.SUPERVISED_LOSSES`: "nll", or "dft" (Wu et al. 2025,
            2508.05629), which weighs each token by its own probability. Images: "nll" only.
        loss_on: which tokens are learned: "completion" (the answer; of `messages` the last one, of
            a plain `text` all), "assistant" (every turn of the assistant in a conversation), or
            "all" (prompts and other speakers, too). Text only.
        neftune_alpha: NEFTune (Jain et al. 2023, 2310.05914): uniform noise of alpha / sqrt(L d)
            on the embeddings of training forwards, for rows of L tokens and width d; 5 there. None
            is no noise. Text only.
        timestep_weighting, timesteps: as in `DPO`. Images only.
    """

    name: ClassVar[str] = "sft"
    paper: ClassVar[str] = (
        "Ouyang et al. 2022, arXiv:2203.02155; images: Rombach et al. 2022, arXiv:2112.10752"
    )
    online: ClassVar[bool] = False
    needs: ClassVar[str] = (
        "messages; or prompt, completion; or text; images: prompt, image; or pairs"
    )

    loss: str = "nll"
    loss_on: LossOn = "completion"
    neftune_alpha: float | None = None
    timestep_weighting: TimestepWeighting = "uniform"
    timesteps: Timesteps = None

    def __post_init__(self) -> None:
        if not isinstance(self.loss, str):
            raise ConfigError(
                "method.loss must be the name of a supervised loss; got "
                f"{type(self.loss).__name__}. Write loss='nll'."
            )
        object.__setattr__(self, "timesteps", as_timesteps(self.timesteps))
        positive("method", neftune_alpha=self.neftune_alpha)
        finite("method", neftune_alpha=self.neftune_alpha)

    def __repr__(self) -> str:
        return shown(self)
