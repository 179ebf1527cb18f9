"""Reward models: learning to score answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from alignkit.errors import ConfigError
from alignkit.methods.common import modifiers
from alignkit.ranges import not_negative

RewardKind = Literal["classifier", "regression", "critique", "pairwise"]
RewardLossName = Literal[
    "bradley_terry", "plackett_luce", "best_of_k", "regression", "ordinal", "nll"
]

DEFAULT_LOSSES: Mapping[str, RewardLossName] = MappingProxyType(
    {
        "classifier": "bradley_terry",
        "regression": "regression",
        "critique": "nll",
        "pairwise": "bradley_terry",
    }
)
"""Kind -> the loss that it is trained with unless another is named."""
VERDICTS: Mapping[str, float] = MappingProxyType({str(n): float(n) for n in range(1, 6)})


@dataclass(frozen=True, repr=False)
class RewardModel:
    """A model that scores answers, from comparisons, ratings or critiques. Text only.

    Attributes:
        kind: "classifier" scores an answer by a head on its last token, from pairs or rankings of K
            answers, in the format of `AutoModelForSequenceClassification`; "regression" does so
            from ratings; "pairwise" reads both answers of a pair and says how probable it is that
            one beats the other (Jiang et al. 2023, 2306.02561; Munos et al. 2023, 2312.00886);
            "critique" is a language model that writes a critique and then a verdict.
        loss: "bradley_terry" (of rankings over all pairs of a prompt, InstructGPT),
            "plackett_luce", "best_of_k"; of ratings "regression" or "ordinal"; of critiques "nll".
            None is the kind's own: "bradley_terry", "regression" or "nll".
        centering: weight of (r_chosen + r_rejected)^2, which keeps scores around 0
            (Eisenstein et al. 2023, 2312.09244, 0.01 there).
        label_smoothing: the share of labels that are taken to be flipped, in [0, 0.5].
        per_token: whether every state of a rated answer learns its rating, as a critic's does; else
            the last one alone.
        standardize: whether ratings are brought to mean 0 and spread 1 while training; what the
            model gives is in the ratings' own unit in any case.
        huber: of ratings, where the squared error becomes a line, in spreads; 0 is nowhere.
        levels: how many ratings 0, 1, ... there are, for loss="ordinal".
        verdicts: verdict of a critique, as written -> the score that it stands for; None is 1 to 5.
    """

    name: ClassVar[str] = "reward_model"
    paper: ClassVar[str] = (
        "Christiano et al. 2017, arXiv:1706.03741; Ouyang et al. 2022, arXiv:2203.02155"
    )
    online: ClassVar[bool] = False
    needs: ClassVar[str] = (
        "pairs: prompt, chosen, rejected; or rankings: prompt, responses; or ratings: prompt, "
        "completion, score; or critiques: prompt, completion, critique, verdict"
    )

    kind: RewardKind = "classifier"
    loss: RewardLossName | None = None
    centering: float = 0.0
    label_smoothing: float = 0.0
    per_token: bool = False
    standardize: bool = True
    huber: float = 0.0
    levels: int | None = None
    verdicts: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        not_negative("method", centering=self.centering, huber=self.huber)
        given = self.verdicts
        if given is not None:
            if len(given) < 2:
                raise ConfigError(f"method.verdicts needs at least two; got {list(given)}.")
            held = MappingProxyType({str(name): float(value) for name, value in given.items()})
            object.__setattr__(self, "verdicts", held)

    @property
    def worth(self) -> Mapping[str, float]:
        """Verdict -> the score that it stands for."""
        return VERDICTS if self.verdicts is None else self.verdicts

    @property
    def trained_on(self) -> RewardLossName:
        """The loss that is named, or the kind's own."""
        return self.loss or DEFAULT_LOSSES[self.kind]

    def __repr__(self) -> str:
        given = {"kind": self.kind, "loss": self.trained_on, **modifiers(self)}
        return f"RewardModel({', '.join(f'{key}={value!r}' for key, value in given.items())})"
