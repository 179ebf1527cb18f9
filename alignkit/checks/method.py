"""What a method asks for, checked before anything is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from alignkit.checks.online import check_online
from alignkit.checks.rejection import check_rejection
from alignkit.checks.reward_model import check_reward_model
from alignkit.checks.supervised import check_supervised
from alignkit.criteria import criterion_of, loss_of
from alignkit.errors import ConfigError
from alignkit.losses import Loss
from alignkit.losses.divergences import check_divergence
from alignkit.losses.modifiers import check_weighting
from alignkit.methods import (
    DPO,
    SFT,
    Method,
    Online,
    Preference,
    RejectionSampling,
    RewardModel,
    modifiers,
)
from alignkit.objectives.criterion import Criterion, OwnLoss
from alignkit.reference_options import NoiseBank, PrecomputedReference
from alignkit.schema import require

if TYPE_CHECKING:
    from alignkit.config import RunConfig

_TEXT_ONLY = {
    "weighting": "it weighs by token probabilities, and images have none",
    "ld_alpha": "it weighs tokens, and an image's likelihood is one number",
}
_IMAGE_ONLY = {
    "timestep_weighting": "text has no timesteps",
    "timesteps": "text has none",
    "safeguard": "it compares residuals of the denoiser, and text has none",
}
_PAIRS_ONLY = {
    "weighting": "its weight is that of a pair's two answers",
    "safeguard": "it guards the chosen image of a pair against the rejected one",
}


def check_method(config: RunConfig, modality: str | None) -> None:
    """Raise `ConfigError` for a method that cannot run as asked."""
    method = config.method
    for name in ("reward", "judge"):
        if not method.online and getattr(config, name) is not None:
            raise ConfigError(
                f"{name} is used by online methods, which score answers as they sample them; "
                f"{type(method).__name__} learns from data. Leave {name} out."
            )
    if isinstance(method, RejectionSampling):
        return check_rejection(config)
    if isinstance(method, Online):
        return check_online(method, config, modality)
    if isinstance(method, RewardModel):
        return check_reward_model(method, config, modality)
    if method.timesteps is not None and method.timestep_weighting == "nats":
        raise ConfigError(
            "method.timestep_weighting='nats' is the ELBO, a sum over all timesteps; got "
            f"method.timesteps={method.timesteps!r}. Leave one of the two out."
        )
    if isinstance(method, SFT):
        return check_supervised(method, config, modality)
    options = config.data_options
    given = options if isinstance(options, Mapping) else vars(options) if options else {}
    if given.get("truncation") == "split":
        raise ConfigError(
            "data_options.truncation='split' makes several rows of a long text without a prompt, "
            f"and {type(method).__name__} compares answers to prompts. Write "
            "truncation='keep_start', or take SFT()."
        )
    loss = loss_of(method)
    if modality is not None:
        _check_unit(loss, method, modality)
    criterion = criterion_of(method, modality or getattr(loss, "modalities", ("text",))[0])
    _check_options(criterion)
    _check_scope(method, criterion, modality)
    if isinstance(method, DPO):
        check_weighting(method.weighting, loss if isinstance(loss, Loss) else None)
        _check_divergence(method, loss, modality)
    _check_reference(config, loss)
    if "kl" in loss.needs and config.trainer.batch_size == 1:
        raise ConfigError(
            f"Loss {loss.name!r} measures the KL on mismatched answers of the global batch, so it "
            "needs more than one; got trainer.batch_size=1. Take 8 or more, or loss='bco'."
        )


def _check_options(criterion: Criterion) -> None:
    """Names, types and ranges of the loss's own options; ranges by trying them on one example."""
    loss = criterion.loss
    if not isinstance(loss, Loss):
        return _check_signature(loss.function, criterion.keywords)
    for key, value in criterion.keywords.items():
        require(type(loss.keywords[key]), value, f"method.{key}")
    loss(loss.probe(), beta=criterion.beta, **criterion.keywords)


def _check_signature(function: Any, keywords: Mapping[str, Any]) -> None:
    try:
        inspect.signature(function).bind(None, beta=1.0, **keywords)
    except TypeError as error:
        given = ", ".join(["scores", "beta=...", *(f"{key}=..." for key in keywords)])
        raise ConfigError(
            f"method.loss is called as loss({given}), which its signature does not allow: {error}."
        ) from None


def _check_scope(method: Preference, criterion: Criterion, modality: str | None) -> None:
    """Modifiers where they have no meaning."""
    scopes = [
        (_TEXT_ONLY, modality == "image", "an option of text policies only"),
        (_IMAGE_ONLY, modality == "text", "an option of image policies only"),
        (_PAIRS_ONLY, criterion.kind.rows != "pairs", "an option of losses of pairs only"),
    ]
    given = modifiers(method)
    for reasons, outside, what in scopes:
        for name in reasons.keys() & given.keys() if outside else ():
            raise ConfigError(
                f"method.{name} is {what}: {reasons[name]}; got {given[name]!r}. Leave it out."
            )


def _check_divergence(method: DPO, loss: Loss | OwnLoss, modality: str | None) -> None:
    row = loss if isinstance(loss, Loss) else None
    check_divergence(method.divergence, method.divergence_alpha, row)
    plain = method.divergence == "reverse_kl"
    if method.divergence != "alpha" and method.divergence_alpha != 0.5:
        raise ConfigError(
            f"method.divergence_alpha belongs to divergence='alpha'; got divergence="
            f"{method.divergence!r}. Leave it out."
        )
    if modality == "image" and not plain and method.timestep_weighting != "nats":
        raise ConfigError(
            f"divergence={method.divergence!r} needs log-ratios in nats, and those of images are "
            "about 1e-4 of half a mean squared error. Write timestep_weighting='nats', or leave "
            "divergence out."
        )


def _check_unit(loss: Loss | OwnLoss, method: Preference, modality: str) -> None:
    """Losses that mean something only in another unit of the log-ratio than this run's."""
    nats = method.timestep_weighting == "nats"
    if modality not in getattr(loss, "modalities", (modality,)):
        raise ConfigError(
            f"Loss {loss.name!r} is made for {' and '.join(loss.modalities)} policies; the policy "  # type: ignore[union-attr]
            f"is of modality {modality!r}. Take a loss such as 'sigmoid'."
        )
    if modality != "image" or getattr(loss, "scale_free", True):
        return
    if "text" in getattr(loss, "modalities", ()) and not nats:
        raise ConfigError(
            f"Loss {loss.name!r} is not a function of beta * log_ratio alone, so it means nothing "
            "for the log-ratios of images, which are about 1e-4. Write timestep_weighting='nats', "
            "or take a loss such as 'sigmoid'."
        )
    if "text" not in getattr(loss, "modalities", ()) and nats:
        raise ConfigError(
            f"Loss {loss.name!r} is a function of an image's mean squared error, which "
            "timestep_weighting='nats' does not give. Leave timestep_weighting out."
        )


def _check_reference(config: RunConfig, loss: Loss | OwnLoss) -> None:
    if loss.needs_reference and config.reference == "none":
        raise ConfigError(
            f"Loss {loss.name!r} compares the policy with a reference; got reference='none'. "
            "Write reference='auto'."
        )
    if loss.needs_reference is False and config.reference not in ("auto", "none"):
        raise ConfigError(
            f"Loss {loss.name!r} uses no reference; got reference={config.reference!r}. "
            "Leave reference out."
        )
    if isinstance(config.reference, (PrecomputedReference, NoiseBank)):
        _check_precomputed(config.method, loss)


def _check_precomputed(method: Method, loss: Loss | OwnLoss) -> None:
    """A table has one number per answer of the data."""
    if isinstance(method, DPO) and method.ld_alpha is not None:
        raise ConfigError(
            f"method.ld_alpha={method.ld_alpha} needs the reference's likelihood of a part of each "
            "answer, and a precomputed reference has the whole one. Write reference='auto'."
        )
    if "kl" in loss.needs:
        raise ConfigError(
            f"Loss {loss.name!r} compares each prompt with another prompt's answer, of which a "
            "precomputed reference knows nothing. Write reference=CachedReference(), which knows "
            "those, too, or take loss='bco'."
        )
