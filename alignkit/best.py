"""Which evaluation was the best, for early stopping and for the checkpoint that is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignkit.errors import ConfigError
from alignkit.options import EarlyStop


class BestSoFar:
    """Follows the metrics that `keep_best` and `early_stop` name, each by itself.

    Args:
        keep: the metric whose best step's checkpoint is kept; lower is better if its name ends in
            "loss".
        stop: when to give up.
    """

    def __init__(self, keep: str | None, stop: EarlyStop | None) -> None:
        self.stop = stop
        self.directions: dict[str, tuple[str, bool]] = {}
        if keep is not None:
            self.directions["keep"] = keep, _lower_is_better(keep)
        if stop is not None:
            lower = stop.mode == "min" or (stop.mode == "auto" and _lower_is_better(stop.metric))
            self.directions["stop"] = stop.metric, lower
        self.found: dict[str, dict[str, Any]] = {}

    def update(self, metrics: Mapping[str, float], step: int) -> None:
        """Take note of one evaluation.

        Raises:
            ConfigError: if it has no metric of the name that was given.
        """
        for purpose, (metric, lower_is_better) in self.directions.items():
            if metric not in metrics:
                known = ", ".join(sorted(metrics)) or "none"
                raise ConfigError(
                    f"{metric!r} is no metric of the evaluation. Its metrics: {known}."
                )
            value = -metrics[metric] if lower_is_better else metrics[metric]
            held = self.found.get(purpose)
            if held is None or value > held["value"]:
                self.found[purpose] = {"value": value, "step": step, "waited": 0}
            else:
                held["waited"] += 1

    @property
    def step_to_keep(self) -> int | None:
        """The step whose checkpoint is kept beside the newest ones."""
        return self.found["keep"]["step"] if "keep" in self.found else None

    @property
    def should_stop(self) -> bool:
        """Whether `early_stop` has lost its patience."""
        held = self.found.get("stop")
        return self.stop is not None and held is not None and held["waited"] >= self.stop.patience

    def state_dict(self) -> dict[str, Any]:
        return {"found": self.found}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.found = {name: dict(held) for name, held in state["found"].items()}


def _lower_is_better(metric: str) -> bool:
    return metric.endswith("loss")
