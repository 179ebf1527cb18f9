"""What in the curves of an online run deserves a warning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from alignkit.facts import show

FAR = 30.0
"""Nats per answer to the reference, beyond which answers are hardly the reference's any more."""

Curves = Mapping[str, Sequence[float]]


def online_alarms(curves: Curves) -> list[str]:
    """Warnings, most telling first; none for runs that write no answers of their own."""
    if "objective/scores" not in curves:
        return []
    found = (_proxy(curves), _far(curves), _collapsed(curves), _longer(curves), *_dead(curves))
    return [warning for warning in found if warning is not None]


def _far(curves: Curves) -> str | None:
    kl = curves.get("objective/kl", [])
    if len(kl) < 4 or end(kl) <= FAR or end(kl) < 2 * abs(start(kl)):
        return None
    return (
        f"The policy went far from the reference: {show(end(kl))} nats per answer at the end. What "
        "a reward says of such answers is a guess. Raise kl_coef, or hold it with "
        "kl_controller='constraint' and kl_target."
    )


def _collapsed(curves: Curves) -> str | None:
    entropy = curves.get("policy/entropy", [])
    if len(entropy) < 4 or end(entropy) >= 0.2 * start(entropy):
        return None
    return (
        f"The entropy collapsed from {show(start(entropy))} to {show(end(entropy))} nats per "
        "token: the policy gives ever the same answers. Raise kl_coef or entropy_coef, or lower "
        "the learning rate."
    )


def _longer(curves: Curves) -> str | None:
    length = curves.get("answers/length", [])
    if len(length) < 4 or end(length) <= 1.5 * start(length):
        return None
    return (
        f"Answers grew from {show(start(length))} to {show(end(length))} tokens. Does the reward "
        "pay for length? Compare scores at equal length, or take a price per token off."
    )


def _proxy(curves: Curves) -> str | None:
    """The trained score up, a watched one down: a part of weight 0 is watched and not trained."""
    trained = curves["objective/scores"]
    if len(trained) < 4 or end(trained) <= start(trained):
        return None
    for name, values in curves.items():
        watched = name.startswith("eval/") and "objective/scores/" in name
        if watched and len(values) >= 2 and values[-1] < values[0]:
            return (
                f"The reward that is trained on rose from {show(start(trained))} to "
                f"{show(end(trained))} while {name} fell from {show(values[0])} to "
                f"{show(values[-1])} on held-out prompts: the policy learned what the reward gets "
                "wrong. Stop earlier, raise kl_coef, or train the reward model on these answers."
            )
    return None


def _dead(curves: Curves) -> list[str | None]:
    """Answers that teach nothing."""
    ended, same = curves.get("answers/ended", []), curves.get("health/equal_groups", [])
    missing = curves.get("health/missing", [])
    clipped = curves.get("critic/clipfrac", [])
    return [
        f"{100 * (1 - end(ended)):.0f} % of the answers were cut by max_new_tokens. Raise it; with "
        "truncation='bootstrap' their scores do not count."
        if ended and end(ended) < 0.5
        else None,
        f"In {100 * end(same):.0f} % of the groups all answers score the same, and nothing is "
        "learned from them. Take more samples_per_prompt, or prompts that are neither too easy nor "
        "too hard."
        if same and end(same) > 0.9
        else None,
        f"{100 * end(missing):.0f} % of the answers had no score and were left out."
        if missing and end(missing) > 0.05
        else None,
        f"The value clip held the critic back in {100 * end(clipped):.0f} % of the tokens. Scale "
        "the scores (normalize_scores=True), or raise value_clip_range."
        if len(clipped) >= 4 and end(clipped) > 0.3
        else None,
    ]


def start(values: Sequence[float]) -> float:
    """Mean of the first quarter."""
    part = values[: max(1, len(values) // 4)]
    return sum(part) / len(part)


def end(values: Sequence[float]) -> float:
    """Mean of the last quarter."""
    part = values[-max(1, len(values) // 4) :]
    return sum(part) / len(part)
