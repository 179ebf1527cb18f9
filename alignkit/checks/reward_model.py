"""What a reward model asks for, checked before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignkit.checks.supervised import _option
from alignkit.criteria import reward_loss_of
from alignkit.errors import ConfigError
from alignkit.losses.ranges import within
from alignkit.methods import RewardModel, modifiers

if TYPE_CHECKING:
    from alignkit.config import RunConfig

_BELONGS = {
    "centering": ("bradley_terry",),
    "label_smoothing": ("bradley_terry",),
    "per_token": ("regression",),
    "standardize": ("regression",),
    "huber": ("regression",),
    "levels": ("ordinal",),
    "verdicts": ("nll",),
}
"""Option -> the losses that it means something to."""


def check_reward_model(method: RewardModel, config: RunConfig, modality: str | None) -> None:
    """Raise `ConfigError` for a reward model that cannot be trained as asked."""
    if modality == "image":
        raise ConfigError(
            "RewardModel scores texts; the policy is of modality 'image'. For images take a scorer "
            "such as 'pickscore'."
        )
    loss = method.trained_on
    if loss != "nll":
        row = reward_loss_of(method)
        if method.kind not in row.kinds:
            raise ConfigError(
                f"Loss {loss!r} trains reward models of kind {' or '.join(row.kinds)}; got "
                f"kind={method.kind!r}. Leave loss out for the kind's own."
            )
    elif method.kind != "critique":
        raise ConfigError(f"Loss 'nll' trains critics; got kind={method.kind!r}. Leave loss out.")
    given = modifiers(method)
    for name, losses in _BELONGS.items():
        if name in given and loss not in losses:
            raise ConfigError(
                f"method.{name} is an option of loss {' or '.join(losses)}; this reward model is "
                f"trained with {loss!r}. Leave it out."
            )
    within("[0, 0.5]", "reward_model", label_smoothing=method.label_smoothing)
    if loss == "ordinal" and (method.levels is None or method.levels < 2):
        raise ConfigError(
            f"Loss 'ordinal' needs method.levels, how many ratings there are; got {method.levels}."
        )
    _check_around(method, config)


def _check_around(method: RewardModel, config: RunConfig) -> None:
    """What else a run may ask for that has no meaning here."""
    if config.reference not in ("auto", "none"):
        raise ConfigError(
            f"A reward model compares with no reference; got reference={config.reference!r}. Leave "
            "reference out."
        )
    if _option(config, "truncation") == "split" and method.kind != "critique":
        raise ConfigError(
            "data_options.truncation='split' makes several rows of a text, and a reward model "
            "scores whole answers. Write truncation='keep_start'."
        )
    if method.kind == "critique":
        return
    trainer = config.trainer
    if trainer.sample_every is not None:
        raise ConfigError(
            f"trainer.sample_every={trainer.sample_every} samples answers, and a reward model "
            "writes none. Leave it out."
        )
    if trainer.router_aux_loss_coef is not None:
        raise ConfigError(
            "trainer.router_aux_loss_coef balances the experts of a policy, and is not supported "
            "for reward models. Leave it out."
        )
