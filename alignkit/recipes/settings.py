"""What the stages of all recipes are told alike."""

from __future__ import annotations

from typing import Any

from alignkit.recipes.journey import Journey


def trainer(journey: Journey, steps: int, *, batch_size: int, rate: float) -> dict[str, Any]:
    """Two steps of eight rows where the plan is quick."""
    return {
        "max_steps": journey.by_size(steps, 2),
        "batch_size": journey.by_size(batch_size, 8),
        "learning_rate": rate,
        "schedule": "cosine",
    }


def generation(journey: Journey) -> dict[str, Any]:
    return {"max_new_tokens": journey.generation.max_new_tokens}
