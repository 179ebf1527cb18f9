"""The text wing: chat LLMs and other causal language models."""

from __future__ import annotations

from typing import Any

__all__ = ["build"]


def build(policy: Any, **options: Any) -> Any:
    """Load a causal language model as a wing; see `alignkit.text.wing.build`."""
    from alignkit.text.wing import build

    return build(policy, **options)
