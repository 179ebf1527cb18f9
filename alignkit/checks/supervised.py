"""What supervised fine-tuning asks for, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from alignkit.criteria import supervised_loss_of
from alignkit.errors import ConfigError
from alignkit.methods import SFT, modifiers

if TYPE_CHECKING:
    from alignkit.config import RunConfig

_TOKENS_ONLY = {
    "loss_on": "it chooses among the tokens of a row, and an image has none",
    "neftune_alpha": "its noise is for the embeddings of tokens, and an image has none",
}


def _option(config: RunConfig, name: str) -> Any:
    """A data option of a run, as given; None where it is not."""
    options = config.data_options
    return options.get(name) if isinstance(options, Mapping) else getattr(options, name, None)


def check_supervised(method: SFT, config: RunConfig, modality: str | None) -> None:
    """Raise `ConfigError` for supervised fine-tuning that cannot run as asked."""
    loss = supervised_loss_of(method)
    if modality == "image" and not loss.additive:
        raise ConfigError(
            f"Loss {loss.name!r} weighs each token by its own probability, and the likelihood of "
            "an image has no such parts. Write loss='nll', the denoising loss."
        )
    given = modifiers(method)
    for name, reason in _TOKENS_ONLY.items():
        if modality == "image" and name in given:
            raise ConfigError(
                f"method.{name} is an option of text policies only: {reason}; got "
                f"{given[name]!r}. Leave it out."
            )
    for name in ("timestep_weighting", "timesteps"):
        if modality == "text" and name in given:
            raise ConfigError(
                f"method.{name} is an option of image policies only: text has no timesteps; got "
                f"{given[name]!r}. Leave it out."
            )
    ties = _option(config, "ties")
    if modality == "image" and ties == "half":
        raise ConfigError(
            "data_options.ties='half' counts both orders of a tie, and supervised fine-tuning "
            "learns the chosen image, which a tie has not. Write ties='drop' or 'error'."
        )
    if config.reference not in ("auto", "none"):
        raise ConfigError(
            "Supervised fine-tuning compares with no reference: it raises the likelihood of the "
            f"answers that are given; got reference={config.reference!r}. Leave reference out, or "
            "take DPO(...), which keeps the policy near one."
        )
