"""From a method to what its objective computes: losses with their numbers filled in, modifiers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignkit.errors import ConfigError, refuse_unknown
from alignkit.losses import (
    GROUP_LOSSES,
    PREFERENCE_LOSSES,
    REWARD_LOSSES,
    SUPERVISED_LOSSES,
    UNPAIRED_LOSSES,
    Loss,
    RewardLoss,
    SupervisedLoss,
    UnpairedLoss,
    weighted_sum,
)
from alignkit.methods import DPO, KTO, SFT, Method, Online, Preference, RewardModel, modifiers
from alignkit.objectives.criterion import Criterion, OwnLoss
from alignkit.objectives.kinds import PAIRS, UNPAIRED
from alignkit.objectives.modifiers import Modifiers
from alignkit.reference_options import SyncedReference

NATS = "per nat of the ELBO's log-ratio, estimated at one timestep and noise"

AnyLoss = Loss | SupervisedLoss | RewardLoss

TABLES_OF: Mapping[type, tuple[Mapping[str, Any], ...]] = {
    DPO: (PREFERENCE_LOSSES, GROUP_LOSSES),
    KTO: (UNPAIRED_LOSSES,),
    SFT: (SUPERVISED_LOSSES,),
    RewardModel: (REWARD_LOSSES, {"nll": SUPERVISED_LOSSES["nll"]}),
}
"""Method -> the tables whose losses it may name."""


def losses_named_by(method: type) -> dict[str, AnyLoss]:
    """Name -> loss, of all that a method may name."""
    return {name: row for table in TABLES_OF.get(method, ()) for name, row in table.items()}


def criterion_of(method: Preference, modality: str) -> Criterion:
    """The loss of a method on a wing, with its beta.

    Raises:
        ConfigError: for a loss or a keyword that there is not.
    """
    loss = loss_of(method)
    given = dict(method.keywords)
    if isinstance(loss, Loss):
        loss.check_keywords(given)
    if isinstance(method, KTO):
        if isinstance(loss, UnpairedLoss):
            weights = ("desirable_weight", "undesirable_weight")
            given |= {name: getattr(method, name) for name in weights}
        return Criterion(loss, beta_of(loss, method, modality), given)
    beta = beta_of(loss, method, modality)
    divergence = method.divergence, method.divergence_alpha
    return Criterion(loss, beta, given, *divergence, _scale(loss, method, beta, modality))


def _scale(loss: Loss | OwnLoss, method: Preference, beta: float, modality: str) -> float:
    """Images: what takes the loss's own power of beta away, so that it is a function of the logit.

    At beta 5000 the gradient of IPO's (h - 1/(2 beta))^2 is 1e-7 of sigmoid's, which an optimizer
    takes for nothing; (beta h - 1/2)^2 has the same minimum and a gradient of sigmoid's size.
    """
    if modality != "image" or method.timestep_weighting == "nats" or not isinstance(loss, Loss):
        return 1.0
    return 1.0 / loss.size(beta)


def loss_of(method: Preference) -> Loss | OwnLoss:
    """The loss that a preference method names, adds up, or brings along."""
    loss = method.loss
    if isinstance(loss, Loss):
        return loss
    if callable(loss):
        return OwnLoss(loss, UNPAIRED if isinstance(method, KTO) else PAIRS)
    names = [loss] if isinstance(loss, str) else list(loss)
    for name in names:
        _refuse_loss(name, method)
    # One table's losses are added up: those of the first name.
    table: Any = next(t for t in TABLES_OF[type(method)] if names[0] in t)
    if others := [name for name in names if name not in table]:
        raise ConfigError(
            f"Losses that are added up take the same kind of rows, and {others[0]!r} takes others "
            f"than {names[0]!r}. Take losses of one table."
        )
    return table[loss] if isinstance(loss, str) else weighted_sum(loss, table)


def _refuse_loss(name: str, method: Method) -> None:
    known = losses_named_by(type(method))
    for other in TABLES_OF:
        if name in losses_named_by(other) and name not in known:
            raise ConfigError(
                f"Loss {name!r} takes other rows than {type(method).__name__} reads; write "
                f"{other.__name__}(loss={name!r})."
            )
    refuse_unknown("loss", name, known)


def rows_of(method: Method, modality: str) -> str:
    """The kind of rows that a method reads."""
    if isinstance(method, SFT):
        return "supervised"
    assert isinstance(method, Preference)
    return criterion_of(method, modality).kind.rows


def supervised_loss_of(method: SFT) -> SupervisedLoss:
    """The loss that supervised fine-tuning names."""
    if method.loss not in SUPERVISED_LOSSES:
        _refuse_loss(method.loss, method)
    return SUPERVISED_LOSSES[method.loss]


def reward_loss_of(method: RewardModel) -> RewardLoss:
    """The loss that a reward model of scores names, or its kind's own."""
    if method.trained_on not in REWARD_LOSSES:
        _refuse_loss(method.trained_on, method)
    return REWARD_LOSSES[method.trained_on]


def beta_of(loss: Loss | OwnLoss, method: Preference, modality: str) -> float:
    """The given beta, or the loss's default in the unit of the wing's log-ratio."""
    if method.beta is not None:
        return method.beta
    row = loss if isinstance(loss, Loss) else PREFERENCE_LOSSES["sigmoid"]
    unit = "text" if method.timestep_weighting == "nats" else modality
    if unit not in row.betas:
        raise ConfigError(
            f"The parts of {row.name!r} have different default betas, so that method.beta must be "
            "given; got None."
        )
    return row.betas[unit].value


def describe(method: Method, modality: str) -> dict[str, Any]:
    """A method for the report: its loss, equation and paper, its numbers and modifiers."""
    if isinstance(method, Online):
        given = {"paper": method.paper, "kl_coef": method.kl_coef, **modifiers(method)}
        told = given.pop("ptx_data", None)
        beside = {"ptx_data": told} if isinstance(told, str) else {}
        return {"name": method.name, **given, **beside}
    if isinstance(method, (SFT, RewardModel)):
        row: Any = losses_named_by(type(method))[_name_of(method)]
        told = {"loss": row.name, "equation": row.equation, "paper": row.paper}
        return {"name": method.name, **told, **modifiers(method)}
    if not isinstance(method, Preference):
        return {"name": method.name, "paper": method.paper, **modifiers(method)}
    criterion = criterion_of(method, modality)
    return {
        "name": method.name,
        "loss": criterion.loss.name,
        "equation": getattr(criterion.loss, "equation", "the user's own function"),
        "paper": getattr(criterion.loss, "paper", method.paper),
        "beta": criterion.beta,
        **({"beta_convention": NATS} if method.timestep_weighting == "nats" else {}),
        **method.keywords,
        **modifiers(method),
    }


def _name_of(method: SFT | RewardModel) -> str:
    return method.trained_on if isinstance(method, RewardModel) else method.loss


def modifiers_of(method: Preference, router: float = 0.0) -> Modifiers:
    """What changes the losses of a method; `router` is the weight of the experts' balance."""
    if isinstance(method, KTO):
        return Modifiers(router=router)
    return Modifiers(
        router=router,
        ld_alpha=method.ld_alpha,
        wpo=method.weighting == "wpo",
        anchor=method.anchor,
        safeguard=method.safeguard,
    )


def named_losses(method: Method) -> list[str]:
    """The names in the tables of what a method's loss is made of."""
    if isinstance(method, RewardModel):
        return [method.trained_on]
    loss = getattr(method, "loss", None)
    if isinstance(loss, (str, Mapping)):
        return [loss] if isinstance(loss, str) else list(loss)
    return []


def cited_options(method: Method, reference: Any) -> list[str]:
    """What of a method and its reference has a paper of its own, as `cite` names it."""
    used = list(modifiers(method))
    if isinstance(method, RewardModel):
        return [name for name in used if name == "centering"]
    if getattr(method, "timestep_weighting", None) == "min_snr":
        used.append("min_snr")
    if len(named_losses(method)) > 1:
        used.append("mixture")
    if isinstance(reference, SyncedReference):
        used.append("synced")
    own = ("divergence", "weighting", "ld_alpha", "anchor", "safeguard", "neftune_alpha")
    return [name for name in used if name in (*own, "min_snr", "mixture", "synced")]
