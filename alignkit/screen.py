"""What whoever watches a run sees: its progress, single lines, and an alarm while there is time."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from alignkit.batches import StepRecord
from alignkit.health import winner_alarm
from alignkit.trainer import Trainer

log = logging.getLogger("alignkit")


class Alarm:
    """Says once, while a run can still be stopped, what its report would warn of."""

    def __init__(self) -> None:
        self._said = False

    def look(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Look at the records so far."""
        if not self._said and (alarm := winner_alarm(history)) is not None:
            self._said = True
            log.warning("Step %d: %s", history[-1]["step"], alarm)


def progress(trainer: Trainer, name: str) -> Any:
    """The bar of a run, from where it stands; of the main process alone."""
    return tqdm(
        total=trainer.total_steps,
        initial=trainer.step,
        desc=name,
        unit="step",
        disable=not trainer.runtime.is_main,
    )


def tell(text: str) -> None:
    """One line for whoever watches, above the progress bar."""
    tqdm.write(text, file=sys.stderr)


def shown(record: StepRecord, metrics: Mapping[str, float]) -> dict[str, str]:
    """The numbers beside the bar."""
    shown = {"loss": f"{record.loss:.4f}"}
    if "rewards/accuracies" in metrics:
        shown["accuracy"] = f"{metrics['rewards/accuracies']:.2f}"
        shown["margin"] = f"{metrics['rewards/margins']:.3g}"
    return shown
