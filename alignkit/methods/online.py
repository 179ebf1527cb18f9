"""What the methods whose policy writes its own answers have in common: the checks of their values,
and how they are shown.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from alignkit.errors import ConfigError
from alignkit.methods.common import modifiers
from alignkit.ranges import finite, is_number, not_negative, positive, share

KLMode = Literal["reward_k1", "loss_k2", "loss_k3"]
KLControl = Literal["fixed", "adaptive", "constraint"]
Critic = Literal["separate", "shared", "reward_model"]
Truncation = Literal["bootstrap", "penalty", "as_end"]

_WRONG_PLACES = {
    "loss_k1": "the gradient of k1 as a loss is 0 in the mean, so that nothing holds the policy",
    "reward_k2": "k2 in the reward pushes into another direction than the KL's gradient",
    "reward_k3": "k3 in the reward pushes into another direction than the KL's gradient: its value "
    "is the KL, its gradient there is not",
}


class Online:
    """What the online methods have in common: their checks and how they are shown.

    Attributes:
        credit: where advantages come from, a name of `alignkit.credit.CREDITS`.
        surrogate: the policy's loss, "clipped" or "reinforce".
        per: what the losses are meant over, a name of `objectives.policy_gradient.WEIGHTS`.
    """

    online: ClassVar[bool] = True
    needs: ClassVar[str] = "prompts: prompt; and reward="
    credit: ClassVar[str]
    surrogate: ClassVar[Literal["clipped", "reinforce"]]
    per: ClassVar[Literal["token", "answer", "answer_mean"]]
    samples_per_prompt: int = 1
    inner_epochs: int = 1
    rollout_size: int | None = None
    critic: Critic | None = None

    def __post_init__(self) -> None:
        given: dict[str, Any] = vars(self)
        for name, check in _RANGES.items():
            if name in given:
                check("method", **{name: given[name]})
                if is_number(given[name]):
                    finite("method", **{name: given[name]})
        _check_kl(given)
        _check_together(given)

    def __repr__(self) -> str:
        listed = ", ".join(f"{key}={value!r}" for key, value in modifiers(self).items())
        return f"{type(self).__name__}({listed})"


_RANGES: dict[str, Any] = {
    "kl_coef": not_negative,
    "kl_target": positive,
    "value_clip_range": positive,
    "vf_coef": positive,
    "entropy_coef": not_negative,
    "gamma": share,
    "lam": share,
    "rollout_size": positive,
    "inner_epochs": positive,
    "early_stop_kl": positive,
    "missing_eos_penalty": not_negative,
    "score_clip": positive,
    "critic_warmup": not_negative,
    "ptx_coef": not_negative,
    "samples_per_prompt": positive,
}
"""Option -> the check of its value."""


def _check_kl(given: dict[str, Any]) -> None:
    """Where the KL stands, and what sets its strength."""
    mode, control, target = given["kl_mode"], given["kl_controller"], given["kl_target"]
    if mode in _WRONG_PLACES:
        raise ConfigError(
            f"method.kl_mode={mode!r} is refused: {_WRONG_PLACES[mode]}. Write 'reward_k1', or "
            "'loss_k2' or 'loss_k3'."
        )
    if control == "fixed" and target is not None:
        raise ConfigError(
            f"method.kl_target={target!r} is what a controller steers to, and "
            "kl_controller='fixed' steers to nothing. Write kl_controller='adaptive' or "
            "'constraint', or leave kl_target out."
        )
    if control in ("adaptive", "constraint") and target is None:
        raise ConfigError(
            f"method.kl_controller={control!r} steers the KL to a target, and none is given. Write "
            "kl_target=6.0 (nats per answer)."
        )
    if control in ("adaptive", "constraint") and given["kl_coef"] == 0:
        raise ConfigError(
            f"method.kl_controller={control!r} multiplies kl_coef, and 0 stays 0; got kl_coef=0. "
            "Start above 0."
        )


def _check_together(given: dict[str, Any]) -> None:
    """Options that ask for one another."""
    if given["truncation"] == "bootstrap" and "critic" not in given:
        raise ConfigError(
            "method.truncation='bootstrap' asks a critic what a cut answer would be worth, and "
            "this method has none. Write truncation='as_end' or 'penalty'."
        )
    if "clip_range" in given:
        positive("method", clip_range=given["clip_range"])
    if given.get("samples_per_prompt") == 1:
        raise ConfigError(
            "method.samples_per_prompt must be at least 2, since answers are compared with the "
            "others to their prompt; got 1. Take REINFORCE() for single answers."
        )
    if (given["ptx_coef"] > 0) != (given["ptx_data"] is not None):
        raise ConfigError(
            "method.ptx_coef and method.ptx_data go together: a weight above 0, and the rows it "
            f"weighs; got ptx_coef={given['ptx_coef']!r} and ptx_data="
            f"{'None' if given['ptx_data'] is None else 'rows'}. Give both or neither."
        )
