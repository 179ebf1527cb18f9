"""The text wing: chat LLMs and other causal language models."""

from __future__ import annotations

from typing import Any

__all__ = ["build", "load_judge", "load_reward"]


def build(policy: Any, **options: Any) -> Any:
    """Load a language model as a wing; see `alignkit.text.wing.build`.

    With `scalar=...` it is one that scores answers; see `alignkit.text.scalar_wing.build`.
    """
    if options.get("scalar") is not None:
        from alignkit.text.scalar_wing import build as build_scalar

        return build_scalar(policy, **options)
    from alignkit.text.wing import build

    options.pop("scalar", None)
    return build(policy, **options)


def load_reward(place: Any, **options: Any) -> Any:
    """A reward model as a `Reward`; see `alignkit.text.scores.load_reward`."""
    from alignkit.text.scores import load_reward

    return load_reward(place, **options)


def load_judge(place: Any, **options: Any) -> Any:
    """A reward model as a `PreferenceJudge`; see `alignkit.text.scores.load_judge`."""
    from alignkit.text.scores import load_judge

    return load_judge(place, **options)
