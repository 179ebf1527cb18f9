"""Rejection sampling: the policy answers, a reward picks, and the picked answers are learnt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from alignkit.errors import ConfigError
from alignkit.methods.common import modifiers
from alignkit.ranges import is_number


@dataclass(frozen=True, repr=False)
class RejectionSampling:
    """Best-of-n and fine-tuning on it: of K answers to each prompt the best by the reward is learnt
    as a demonstration, in one or several rounds.

    Touvron et al. 2023 (2307.09288), section 3.2.3; RAFT, Dong et al. 2023 (2304.06767). With K
    draws from a policy mu, and F the mass of mu at or below a score, the best one is from

        F(y)^K - F(y-)^K        whose KL to mu is at most ln K - (K - 1) / K

    and so is the policy at the optimum of a round.

    Attributes:
        samples_per_prompt: K answers to each prompt, in each round.
        rounds: how often the policy answers and learns; `trainer` speaks of one round.
        temperatures: the k-th answer is drawn at the (k modulo their number)-th of them.
            `generation.temperature` is for the report's samples.
        keep_earlier: an answer of an earlier round stays a prompt's best until one beats it.
            Without it each round knows its own answers alone (which forgot, in the paper).
        start: what a round's training starts from: "round", what the round before left; or "first",
            the policy that was given, as in the paper. Answers are the newest policy's either way.
    """

    name: ClassVar[str] = "rejection_sampling"
    paper: ClassVar[str] = "Touvron et al. 2023, Llama 2, arXiv:2307.09288"
    online: ClassVar[bool] = True
    needs: ClassVar[str] = "prompts: prompt; and reward="

    samples_per_prompt: int = 4
    rounds: int = 1
    temperatures: tuple[float, ...] = (1.0,)
    keep_earlier: bool = True
    start: Literal["round", "first"] = "round"

    def __post_init__(self) -> None:
        for name in ("samples_per_prompt", "rounds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"method.{name} must be a whole number of at least 1; got {value!r}."
                )
        given = self.temperatures
        listed = isinstance(given, (tuple, list)) and len(given) > 0
        if not listed or not all(is_number(t) and 0 < t < float("inf") for t in given):
            raise ConfigError(
                "method.temperatures is a list of numbers above 0, at least one; got "
                f"{given!r}. Write (1.0,)."
            )
        if len(given) > self.samples_per_prompt:
            raise ConfigError(
                f"method.temperatures has {len(given)} entries, and samples_per_prompt="
                f"{self.samples_per_prompt} answers cannot have them all. Raise samples_per_prompt."
            )
        object.__setattr__(self, "temperatures", tuple(float(t) for t in given))

    def __repr__(self) -> str:
        listed = ", ".join(f"{key}={value!r}" for key, value in modifiers(self).items())
        return f"RejectionSampling({listed})"
