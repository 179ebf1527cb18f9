"""The text wing: chat LLMs and other causal language models."""

from __future__ import annotations

from typing import Any

__all__ = ["build"]


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
