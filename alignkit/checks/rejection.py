"""What rejection sampling asks for, checked before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignkit.errors import ConfigError

if TYPE_CHECKING:
    from alignkit.config import RunConfig


def check_rejection(config: RunConfig) -> None:
    """Raise `ConfigError` for rejection sampling that cannot run as asked."""
    if config.reward is None:
        raise ConfigError(
            "RejectionSampling keeps the answers that score best, and there is nothing that "
            "scores; got reward=None. Give reward=, a function of (prompts, responses, rows)."
        )
    if config.judge is not None:
        raise ConfigError(
            "RejectionSampling keeps the best of answers of several rounds, whose scores are "
            "compared; a judge compares answers of one. Give a reward, and leave judge out."
        )
    if config.reference not in ("auto", "none"):
        raise ConfigError(
            "RejectionSampling compares with no reference: it raises the likelihood of picked "
            f"answers; got reference={config.reference!r}. Leave reference out."
        )
