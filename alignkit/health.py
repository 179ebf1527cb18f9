"""What in the curves of a run deserves a warning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from alignkit.facts import series, show
from alignkit.online_health import end, online_alarms, start

PATIENCE = 3
"""Evaluations in a row at which the winner's error must have grown for an alarm."""

_REMEDY = "Stop earlier, lower the learning rate, raise beta, or give DPO an anchor or a safeguard."


def health(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What in the curves of a run deserves a warning."""
    curves = {name: [value for _, value in points] for name, points in series(records).items()}
    warnings = []
    lost = [
        r.get("step") for r in records if any(r.get(k, 0) is None for k in ("loss", "grad_norm"))
    ]
    if lost:
        warnings.append(
            f"The loss or its gradient was not finite at step {lost[0]}. Lower the learning rate, "
            "or train in bf16 or fp32."
        )
    losses = curves.get("loss", [])
    if len(losses) >= 5 and max(losses) - min(losses) <= 1e-4 * abs(sum(losses) / len(losses)):
        warnings.append(
            f"The loss never moved from {show(losses[0])}. Is the learning rate too low, or is "
            "nothing trainable?"
        )
    accuracy, chosen = curves.get("rewards/accuracies", []), curves.get("rewards/chosen", [])
    rose = len(accuracy) >= 2 and end(accuracy) > start(accuracy)
    if chosen and rose and end(chosen) < -2:
        warnings.append(
            f"Likelihood displacement: the accuracy rose while rewards/chosen fell to "
            f"{show(end(chosen))}, so the chosen answers became less likely too and the mass went "
            "elsewhere. Raise beta, add an SFT term on the chosen answers, or train fewer steps."
        )
    if len(accuracy) >= 5 and end(accuracy) < 0.45:
        warnings.append(
            f"The policy ends up preferring the rejected answers (accuracy {end(accuracy):.2f}). "
            "Are chosen and rejected swapped, or is the learning rate too high?"
        )
    held_out = curves.get("eval/rewards/accuracies", [])
    if accuracy and held_out and end(accuracy) - held_out[-1] > 0.2:
        warnings.append(
            f"Overfitting: accuracy {end(accuracy):.2f} on training pairs, {held_out[-1]:.2f} on "
            "held-out ones. Train fewer steps, raise beta, or add data."
        )
    if (alarm := winner_alarm(records)) is not None:
        warnings.append(alarm)
    return warnings + online_alarms(curves)


def winner_alarm(records: Sequence[Mapping[str, Any]]) -> str | None:
    """Whether the chosen pictures are denoised ever worse than by the reference.

    A preference is also won by spoiling the loser faster than the winner, and no margin shows it
    (Wallace et al. 2023 leave both errors free). The rule: on a held-out set the error of chosen
    pictures is above the reference's, and it grew at each of the last `PATIENCE` evaluations, the
    start (no difference) counting as one. All evaluations use the same timesteps and noises, so
    that what grows is no noise of the estimate. Without a held-out set the curve of training stands
    in, in `PATIENCE` + 1 equal parts, whose last must be two standard errors above 0.
    """
    curves = {name: [value for _, value in points] for name, points in series(records).items()}
    held_out = {
        name: values
        for name, values in curves.items()
        if name.startswith("eval/") and name.endswith("error/chosen")
    }
    for name, values in held_out.items():
        if _grows([0.0, *values]):
            times = PATIENCE
            return (
                f"The winner gets worse: {name} is {show(values[-1])} above the reference's and "
                f"grew at each of the last {times} evaluations. The margin is won at the cost of "
                f"the chosen pictures. {_REMEDY}"
            )
    values = curves.get("error/chosen", [])
    if not held_out and len(values) >= 4 * (PATIENCE + 1):
        size = len(values) // (PATIENCE + 1)
        parts = [
            values[-size * n : len(values) - size * (n - 1)] for n in range(PATIENCE + 1, 0, -1)
        ]
        means = [sum(part) / size for part in parts]
        spread = sum((value - means[-1]) ** 2 for value in parts[-1]) / (size - 1)
        if _grows(means) and means[-1] > 2 * math.sqrt(spread / size):
            return (
                f"The winner gets worse: error/chosen, {show(means[-1])} above the reference's of "
                f"late, grew all through training. {_REMEDY}"
            )
    return None


def _grows(values: Sequence[float]) -> bool:
    last = values[-PATIENCE - 1 :]
    rising = all(later > earlier for earlier, later in pairwise(last))
    return len(last) == PATIENCE + 1 and rising and last[-1] > 0
