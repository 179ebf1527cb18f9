"""What a method asks for, checked before anything is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError, refuse_unknown
from alignkit.schema import require

if TYPE_CHECKING:
    from alignkit.config import RunConfig


def check_method(config: RunConfig, modality: str | None) -> None:
    """Raise `ConfigError` for a method that cannot run as asked."""
    method = config.method
    for name in ("reward", "judge"):
        if not method.online and getattr(config, name) is not None:
            raise ConfigError(
                f"{name} is used by online methods, which score answers as they sample them; "
                f"{type(method).__name__} learns from the preferences in data. Leave {name} out."
            )
    loss: Any = method.loss
    if isinstance(loss, str):
        from alignkit.losses import PREFERENCE_LOSSES

        refuse_unknown("loss", loss, PREFERENCE_LOSSES)
        loss = PREFERENCE_LOSSES[loss]
    if hasattr(loss, "check_keywords"):
        _check_table_loss(loss, method.keywords)
    else:
        try:
            inspect.signature(loss).bind(None, beta=1.0, **method.keywords)
        except TypeError as error:
            given = ", ".join(["scores", "beta=...", *(f"{key}=..." for key in method.keywords)])
            raise ConfigError(
                f"method.loss is called as loss({given}), which its signature does not allow: "
                f"{error}."
            ) from None
    if modality == "image" and not getattr(loss, "scale_free", True):
        raise ConfigError(
            f"Loss {loss.name!r} is not a function of beta * log_ratio alone, so it means nothing "
            "for the log-ratios of images, which are about 1e-4. Take a loss such as 'sigmoid'."
        )
    needs_reference = getattr(loss, "needs_reference", None)
    if needs_reference is True and config.reference == "none":
        raise ConfigError(
            f"Loss {loss.name!r} compares the policy with a reference; got reference='none'. "
            "Write reference='auto'."
        )
    if needs_reference is False and config.reference not in ("auto", "none"):
        raise ConfigError(
            f"Loss {loss.name!r} uses no reference; got reference={config.reference!r}. "
            "Leave reference out."
        )


def _check_table_loss(loss: Any, keywords: Mapping[str, Any]) -> None:
    """Names, types and ranges of a loss's own options; ranges by evaluating it on one pair."""
    import torch

    from alignkit.losses import PairScores

    loss.check_keywords(keywords)
    for key, value in keywords.items():
        require(type(loss.keywords[key]), value, f"method.{key}")
    zero, one = torch.zeros(1), torch.ones(1)
    probe = PairScores(zero, zero, zero, zero, chosen_length=one, rejected_length=one)
    loss(probe, beta=1.0, **keywords)
