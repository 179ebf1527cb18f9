"""What the counts over a set of text rows mean, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignkit.data_report import Finding, Level
from alignkit.intervals import wilson

BIASED = 0.1
"""From this distance to one half on, the longer answer says too much about which was chosen."""


def findings_of(
    seen: Any,
    skipped: Mapping[str, int],
    losses: Sequence[tuple[str, int, str]],
    kind: str,
    unit: str,
) -> list[Finding]:
    """Findings about what `examination.Seen` counted."""
    found = [_losses(seen, losses)]
    if not seen.usable:
        return [Finding("warning", "No row can be used. See what a run would leave out.")]
    found += _repeats(seen)
    if kind == "pairs":
        found += _length_bias(seen, unit)
    if kind == "unpaired":
        found.append(_balance(seen))
    return found


def _losses(seen: Any, losses: Sequence[tuple[str, int, str]]) -> Finding:
    if not losses:
        return Finding("good", "Every row can be used as it is.")
    listed = "; ".join(f"{what} ({count})" for what, count, _ in losses)
    share = sum(count for _, count, _ in losses) / max(1, seen.rows)
    level: Level = "warning" if share > 0.05 else "note"
    return Finding(level, f"A run would leave out or cut {share:.1%} of the rows: {listed}.")


def _repeats(seen: Any) -> list[Finding]:
    found = []
    if seen.repeated:
        level: Level = "warning" if seen.repeated > 0.01 * seen.usable else "note"
        text = f"{seen.repeated} rows repeat an earlier one word for word. Remove them, or weigh."
        found.append(Finding(level, text))
    else:
        found.append(Finding("good", "No row repeats another."))
    if seen.reversed:
        text = (
            f"{seen.reversed} pairs contradict an earlier one: the same two answers, the other "
            "chosen. A loss that expects noise fits, such as cdpo or robust."
        )
        found.append(Finding("warning", text))
    most = max(seen.prompt_keys.values())
    if most > max(10, 0.01 * seen.usable):
        found.append(
            Finding("note", f"One prompt comes {most} times; held-out rows must not share prompts.")
        )
    return found


def _length_bias(seen: Any, unit: str) -> list[Finding]:
    """The share of pairs whose chosen answer is the longer one, with its 95 % interval."""
    chosen, rejected = (np.asarray(seen.answers[name]) for name in ("chosen", "rejected"))
    longer, unequal = int(np.sum(chosen > rejected)), int(np.sum(chosen != rejected))
    if not unequal:
        return []
    low, high = wilson(longer, unequal)
    share = longer / unequal
    text = (
        f"The chosen answer is the longer one in {share:.1%} of the pairs of unequal length (95 % "
        f"interval {low:.1%} to {high:.1%}), by {np.mean(chosen - rejected):.3g} "
        f"{unit} in the mean."
    )
    if low > 0.5 + BIASED or high < 0.5 - BIASED:
        advice = " Training will teach length: compare with simpo or ld_alpha, and judge by length."
        return [Finding("warning", text + advice)]
    even = low <= 0.5 <= high
    return [Finding("good" if even else "note", text)]


def _balance(seen: Any) -> Finding:
    share = seen.liked / seen.usable
    text = f"{share:.1%} of the answers are liked."
    if 0.2 <= share <= 0.8:
        return Finding("good", text)
    liked, disliked = seen.liked, seen.usable - seen.liked
    advice = (
        f" KTO wants weights that balance: desirable_weight x {liked} near undesirable_weight x "
        f"{disliked}."
    )
    return Finding("warning", text + advice)
