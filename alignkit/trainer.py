"""The training loop: accumulate, backward, clip, step, yield a record.

It knows no modality and no algorithm: an objective turns batches into summed losses, a source gives
batches. It is final. Whoever wants to evaluate, save, print or stop early writes a loop around
`steps()`; what seems to need a change here needs another objective, another source, or such a loop.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from alignkit.batches import Batch, Metrics, StepRecord
from alignkit.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from alignkit.optim import learning_rate_at, make_optimizer
from alignkit.options import TrainerOptions
from alignkit.protocols import BatchSource, Objective
from alignkit.runtime import Runtime


@final
class Trainer:
    """Runs an objective over a source.

    Args:
        objective: what is optimised; its modules are wrapped for the processes here.
        source: this process's share of one global batch after another.
        options: steps, rates, clipping, logging.
        runtime: devices and processes; made from the options when left out.
        learning_rate: the peak rate; `options.learning_rate` when left out.

    Raises:
        ConfigError: if neither the options nor the source say how many steps there are, or no
            learning rate is given.
    """

    def __init__(
        self,
        objective: Objective,
        source: BatchSource,
        options: TrainerOptions | None = None,
        *,
        runtime: Runtime | None = None,
        learning_rate: float | None = None,
    ) -> None:
        self.objective = objective
        self.source = source
        self.options = options = options or TrainerOptions()
        self.runtime = runtime or Runtime(sharding=options.sharding)
        rate = learning_rate or options.learning_rate
        if rate is None:
            raise ConfigError(
                "The trainer needs a learning rate; set TrainerOptions(learning_rate=...)."
            )
        self.learning_rate = rate
        self.total_steps = self._total_steps()
        modules = objective.trainable.modules
        if not any(p.requires_grad for module in modules.values() for p in module.parameters()):
            raise ConfigError(
                "Nothing is trained: no parameter of the objective requires a gradient."
            )
        make = partial(make_optimizer, options=options, learning_rate=rate)
        self.modules, self.optimizer = self.runtime.engage(modules, make)
        for name, module in self.modules.items():
            objective.trainable.replace(name, module)
        objective.prepare(self.runtime)
        self.parameters = dict(self._named_parameters())
        self.step = 0
        self.skipped_steps = 0
        self._pending: dict[str, tuple[Tensor, Tensor]] = {}

    def _total_steps(self) -> int:
        total = self.options.max_steps or self.source.total_steps
        if total is None:
            raise ConfigError(
                "The source is endless, so trainer.max_steps must say when to stop. Set max_steps."
            )
        return total

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for owner, module in self.modules.items():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    yield f"{owner}.{name.removeprefix('module.')}", parameter

    def steps(self) -> Iterator[StepRecord]:
        """One record per optimizer step, until the last step or the end of the source."""
        batches = iter(self.source)
        # Asked before the next batch is pulled: an online source must not sample in vain.
        while self.step < self.total_steps:
            batch = next(batches, None)
            if batch is None:
                return
            yield self._advance(batch)

    def fit(self) -> list[StepRecord]:
        """Exhaust `steps()`."""
        return list(self.steps())

    def _advance(self, batch: Batch) -> StepRecord:
        started = time.perf_counter()
        step = self.step + 1
        loss, norm = self._accumulate(batch, step)
        if loss != loss or abs(loss) == float("inf") or not self._finite_gradient(norm):
            self._refuse(batch, step, loss, norm)
        rate = learning_rate_at(step, self.total_steps, self.options, self.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.runtime.scaler is None:
            self.optimizer.step()
        else:
            self.runtime.scaler.step(self.optimizer)
            self.runtime.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step = step
        self.objective.after_step(step)
        logged = step % self.options.log_every == 0 or step in (1, self.total_steps)
        metrics = self._reduce_metrics() if logged else {}
        return StepRecord(step, loss, norm, rate, metrics, time.perf_counter() - started)

    def _accumulate(self, batch: Batch, step: int) -> tuple[float, float]:
        """Gradients of the global mean loss: returns (loss, gradient norm), one device read."""
        normaliser = float(self.runtime.sum(self.objective.normaliser(batch)))
        if normaliser <= 0:
            raise DataError(f"All rows of step {step} have weight 0, so there is nothing to learn.")
        micros = list(self.objective.micro_batches(batch, step))
        num = self.runtime.max(len(micros))
        # Sharded forwards talk to each other: every process makes the same number of them.
        micros += [self.objective.absent(micros[0])] * (num - len(micros))
        total = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for place, micro in enumerate(micros):
            with self.runtime.last_backward(self.modules.values(), last=place == num - 1):
                loss, metrics = self.objective(micro)
                self.runtime.backward(loss / normaliser)
            total += loss.detach()
            self._add(metrics)
        if self.runtime.scaler is not None:
            self.runtime.scaler.unscale_(self.optimizer)
        norm = self.runtime.clip(list(self.parameters.values()), self.options.max_grad_norm)
        total = self.runtime.sum(total) / normaliser
        values = torch.stack([total, norm.to(total)]).tolist()
        return values[0], values[1]

    def _finite_gradient(self, norm: float) -> bool:
        if norm == norm and norm != float("inf"):
            return True
        # Under fp16 an overflow is how the gradient scale is found: the scaler skips the step
        # itself.
        self.skipped_steps += self.runtime.scaler is not None
        return self.runtime.scaler is not None

    def _refuse(self, batch: Batch, step: int, loss: float, norm: float) -> None:
        """Stop before the update, naming the rows whose own loss is not finite."""
        rows: list[int] = []
        micros = list(self.objective.micro_batches(batch, step))
        num = self.runtime.max(len(micros))
        for micro in micros + [self.objective.absent(micros[0])] * (num - len(micros)):
            rows += self.objective.culprits(micro)
        self.optimizer.zero_grad(set_to_none=True)
        rows = sorted(set(self.runtime.gather(torch.tensor(rows, dtype=torch.int64)).tolist()))
        if not rows:
            named = (
                "No single row's loss is to blame; the batch held rows "
                f"{_some(batch.row_id.tolist())}"
            )
        else:
            named = f"Rows whose loss is not finite: {_some(rows)}"
        raise NonFiniteError(
            f"Step {step} stopped before its update: the loss must be finite, and it is {loss}, "
            "with a "
            f"gradient norm of {norm}. {named}. Look at these rows and at the weights (NaN in the "
            "checkpoint?), or lower the learning rate."
        )

    def _add(self, metrics: Metrics) -> None:
        for name, (value, count) in metrics.items():
            held = self._pending.get(name)
            self._pending[name] = (
                (value, count) if held is None else (held[0] + value, held[1] + count)
            )

    def _reduce_metrics(self) -> dict[str, float]:
        """Means since the last logged step: one packed reduction, one device read."""
        # Sorted: after a resume the main process alone holds some, in the checkpoint's order.
        names = sorted(self._pending)
        if not names:
            return {}
        packed = torch.stack([torch.stack(self._pending[name]).double() for name in names])
        sums = self.runtime.sum(packed).tolist()
        self._pending = {}
        return {
            name: value / count for name, (value, count) in zip(names, sums, strict=True) if count
        }

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Means of the objective's metrics over the given global batches, without training.

        The draws are keyed by step 0 and the row's place among all of them, so that every
        evaluation of a run sees the same ones.
        """
        kept, self._pending = self._pending, {}
        seen = 0
        for batch in batches:
            placed = replace(batch, position=batch.position + seen)
            micros = list(self.objective.micro_batches(placed, 0))
            num = self.runtime.max(len(micros))
            for micro in micros + [self.objective.absent(micros[0])] * (num - len(micros)):
                self._add(self.objective.evaluate(micro))
            seen += self.runtime.max(int(batch.position.max()) + 1)
        values, self._pending = self._reduce_metrics(), kept
        return {**values, **self.objective.derived(values)}

    def state_dict(self) -> dict[str, Any]:
        """All state that matters. All processes must call it; the main one's is whole."""
        return {
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "parameters": {n: self.runtime.whole(p) for n, p in self.parameters.items()},
            "optimizer": {
                n: self.runtime.optimizer_state(self.optimizer, p)
                for n, p in self.parameters.items()
            },
            "pending": self._pending_state(),
            "objective": self.objective.state_dict(),
            "source": self.source.state_dict(),
            "scaler": None if self.runtime.scaler is None else self.runtime.scaler.state_dict(),
        }

    def _pending_state(self) -> dict[str, Tensor]:
        """Metrics since the last logged step, summed over processes."""
        return {
            name: self.runtime.sum(torch.stack(pair).double())
            for name, pair in sorted(self._pending.items())
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, on any number of processes.

        Raises:
            CheckpointError: if the trained parameters are not the same.
        """
        saved = state["parameters"]
        if set(saved) != set(self.parameters):
            missing = sorted(set(self.parameters) ^ set(saved))
            raise CheckpointError(
                f"The checkpoint trains other parameters than this run: {_some(missing)} are "
                "only in "
                'one of them. Use the same policy and adapter, or start anew with resume="never".'
            )
        for name, parameter in self.parameters.items():
            self.runtime.assign(parameter, saved[name])
            if kept := state["optimizer"][name]:
                self.runtime.load_optimizer_state(self.optimizer, parameter, kept)
        self.runtime.renew(self.modules.values())
        self.step = state["step"]
        self.skipped_steps = state["skipped_steps"]
        self._pending = {}
        if self.runtime.is_main:
            device = self.runtime.device
            held = {name: pair.to(device) for name, pair in state["pending"].items()}
            self._pending = {name: (pair[0], pair[1]) for name, pair in held.items()}
        self.objective.load_state_dict(state["objective"])
        self.source.load_state_dict(state["source"])
        if self.runtime.scaler is not None and state["scaler"]:
            self.runtime.scaler.load_state_dict(state["scaler"])


def _some(items: list[Any], limit: int = 16) -> str:
    shown = ", ".join(map(str, items[:limit]))
    return shown + (f" and {len(items) - limit} more" if len(items) > limit else "")
