"""What the methods have in common: the checks of their values, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any, Literal

from alignkit.errors import ConfigError, refuse_unknown
from alignkit.ranges import finite, positive

TimestepWeighting = Literal["uniform", "min_snr", "elbo", "nats"]
Timesteps = Literal["turbo"] | tuple[int, ...] | None


def modifiers(method: Any) -> dict[str, Any]:
    """The options of a method, apart from its losses and beta, that are not at their defaults."""
    names = [f.name for f in fields(method) if f.name not in ("loss", "beta", "keywords")]
    given = {name: getattr(method, name) for name in names}
    return {name: value for name, value in given.items() if value != getattr(type(method), name)}


def fill(method: Any, keywords: Mapping[str, Any], **values: Any) -> None:
    """Set the fields of a frozen method, after the checks that all preference methods share."""
    loss, beta = values["loss"], values["beta"]
    positive("method", beta=beta)
    finite("method", beta=beta)
    if isinstance(loss, Mapping):
        values["loss"] = MappingProxyType(_weights(loss))
    elif not (isinstance(loss, str) or callable(loss)):
        raise ConfigError(
            "method.loss must be a name of a loss, a mapping from names to weights, or a function "
            f"of scores; got {type(loss).__name__}."
        )
    values["beta"] = None if beta is None else float(beta)
    values["keywords"] = MappingProxyType(dict(keywords))
    for name, value in values.items():
        object.__setattr__(method, name, value)


def as_timesteps(given: Any) -> Any:
    """A list of timesteps as a tuple; anything else as it is, for the check of its type."""
    if isinstance(given, str):
        refuse_unknown("timesteps", given, ("turbo",))
    return tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else given


def _weights(loss: Mapping[str, float]) -> dict[str, float]:
    if not loss:
        raise ConfigError("method.loss as a mapping needs at least one loss; got {}.")
    for name, weight in loss.items():
        positive("method.loss", **{str(name): weight})
    return {str(name): float(weight) for name, weight in loss.items()}


def shown(method: Any) -> str:
    """A method as it is written in Python, without what is at its default."""
    loss: Any = method.loss
    if isinstance(loss, Mapping):
        loss = dict(loss)
    elif not isinstance(loss, str):
        loss = getattr(loss, "__name__", getattr(loss, "name", "custom"))
    named = {name: getattr(method, name) for name in ("beta",) if hasattr(method, name)}
    given = {"loss": loss, **named, **modifiers(method), **getattr(method, "keywords", {})}
    listed = ", ".join(f"{key}={value!r}" for key, value in given.items())
    return f"{type(method).__name__}({listed})"
