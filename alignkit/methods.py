"""The methods that `align()` knows: what to optimise, named by the caller and never guessed.

A method is a frozen value. It says which rows it needs and which paper it is; the objective it
becomes is built by the roof. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

from alignkit.errors import ConfigError


@dataclass(frozen=True, init=False)
class DPO:
    """Direct preference optimisation and its family: one offline phase on preference pairs.

    Rafailov et al. 2023 (2305.18290) for text; Wallace et al. 2023 (2311.12908) for images.

    Attributes:
        loss: a name of `alignkit.losses.PREFERENCE_LOSSES`, or a function
            `(scores: PairScores, *, beta) -> (B,)` of your own.
        beta: strength of the KL to the reference; None takes that loss's default for the wing,
            which is printed. Text: per nat of the summed log-ratio. Images: the convention of
            Wallace et al., mean squared error with one half (5000 for SDXL at 1024 px).
        keywords: the loss's own options, such as `label_smoothing`.
    """

    name: ClassVar[str] = "dpo"
    paper: ClassVar[str] = (
        "Rafailov et al. 2023, arXiv:2305.18290; images: Wallace et al. 2023, arXiv:2311.12908"
    )
    rows: ClassVar[str] = "pairs"
    online: ClassVar[bool] = False
    needs: ClassVar[str] = "preference pairs: prompt, chosen, rejected"

    loss: str | Callable[..., Any] = "sigmoid"
    beta: float | None = None
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def __init__(
        self,
        loss: str | Callable[..., Any] = "sigmoid",
        beta: float | None = None,
        **keywords: Any,
    ) -> None:
        if beta is not None and not (isinstance(beta, (int, float)) and beta > 0):
            raise ConfigError(f"method.beta must be a number above 0; got {beta!r}.")
        if not (isinstance(loss, str) or callable(loss)):
            raise ConfigError(
                "method.loss must be a name of PREFERENCE_LOSSES or a function of PairScores; "
                f"got {type(loss).__name__}."
            )
        object.__setattr__(self, "loss", loss)
        object.__setattr__(self, "beta", None if beta is None else float(beta))
        object.__setattr__(self, "keywords", MappingProxyType(dict(keywords)))

    def __repr__(self) -> str:
        name = self.loss if isinstance(self.loss, str) else getattr(self.loss, "__name__", "custom")
        given = {"loss": name, "beta": self.beta, **self.keywords}
        return f"DPO({', '.join(f'{key}={value!r}' for key, value in given.items())})"


METHODS: Mapping[str, type[DPO]] = MappingProxyType({DPO.name: DPO})
"""Name in YAML -> method."""


def methods() -> list[dict[str, str]]:
    """Every method with its paper and what it needs."""
    return [
        {"name": name, "class": cls.__name__, "paper": cls.paper, "needs": cls.needs}
        for name, cls in METHODS.items()
    ]
