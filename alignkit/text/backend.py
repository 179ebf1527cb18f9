"""Evaluates answers under the policy: micro-batches, and the layout in which they are computed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from alignkit.batches import Batch
from alignkit.errors import ConfigError
from alignkit.protocols import Key
from alignkit.text.kernels import PLAIN, Call, chosen
from alignkit.text.likelihood import TextLikelihood
from alignkit.text.module import TextModule
from alignkit.text.noise import EmbeddingNoise
from alignkit.text.packing import PACKED, positions_of
from alignkit.text.packing_check import obstacle

log = logging.getLogger(__name__)

AUTO_TOKENS = 8192
"""Positions per micro-batch for "auto"."""


class TextBackend:
    """Evaluates answers under the policy. Text needs no draw, unless its embeddings get noise.

    Attributes:
        module: the policy's likelihood module, wrapped or not.
        layout: how batches are computed: "padded", or a packed layout.
        kernels: names of what computes the attention of packed rows, in order.
        by_length: whether padded micro-batches are made of groups of like length: always, never
            (False), or where their size is "auto", too (None).
        beside: likelihood modules that compute the same batches, such as a reference's.
        neftune_alpha: strength of the noise on the embeddings of training forwards, or None.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: nn.Module = module
        self.layout = "padded"
        self.kernels: tuple[str, ...] = PLAIN
        self.by_length: bool | None = None
        self.beside: list[nn.Module] = []
        self.neftune_alpha: float | None = None
        self._obstacles: dict[str, str | None] = {}
        self._calls: list[Call] = []

    def draw(self, batch: Batch, key: Key) -> EmbeddingNoise | None:
        """The noise of a training step; an evaluation, whose step is 0, has none."""
        if self.neftune_alpha is None or key[1] == 0:
            return None
        return EmbeddingNoise.of(self.neftune_alpha, batch, key)

    def temper(self, temperature: float) -> None:
        """See `capabilities.Tempers`."""
        for module in (self.module, *self.beside):
            if isinstance(module, TextLikelihood):
                module.head.temperature = temperature

    def choose(self, packing: str, attention: str = "auto") -> None:
        """Take up `TextOptions.packing` and `attention`, as far as the models allow.

        All processes call it alike: sharded weights come together for the trial.

        Raises:
            ConfigError: if something that is asked for by name is not allowed.
        """
        self.layout, self.by_length = "padded", {"bucket": True, "none": False}.get(packing)
        if packing in ("bucket", "none"):
            return
        wanted = "prefix" if packing == "auto" else packing
        reason = self._obstacle(wanted)
        if reason is None:
            self.layout = wanted
            self._attend_by(attention)
        elif packing == "auto":
            log.warning("Answers are padded and not packed: %s", reason)
        else:
            raise ConfigError(
                f"data_options.packing={packing!r} computes many answers in one row, and this "
                f"model cannot: {reason} Write packing='bucket'."
            )

    def _obstacle(self, layout: str) -> str | None:
        """Why the models cannot compute a layout, or None; found by trying, once."""
        if layout not in self._obstacles:
            found = (obstacle(module, layout, self._calls) for module in self._modules())
            self._obstacles[layout] = next((reason for reason in found if reason), None)
        return self._obstacles[layout]

    def facts(self) -> dict[str, str]:
        """How answers are computed, for the report."""
        told = {"layout of answers": self.layout}
        if self.layout in PACKED:
            told["attention over packed rows"] = ", ".join(self.kernels)
        return told

    def _modules(self) -> list[TextModule]:
        held = [getattr(m, "module", m) for m in (self.module, *self.beside)]  # DDP's inside
        return [module for module in held if isinstance(module, TextModule)]

    def _attend_by(self, attention: str) -> None:
        """Policy and reference by the same kernels, so that equal weights give equal numbers."""
        self.kernels, refused = chosen(attention, self._calls)
        told = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        if refused and attention != "auto":
            raise ConfigError(
                f"data_options.attention={attention!r} cannot compute this run's packed rows: "
                f"{told}. Write attention='auto'."
            )
        if refused:
            log.info("Packed rows are computed by %s (%s).", ", ".join(self.kernels), told)
        for module in self._modules():
            module.kernels = self.kernels

    def split(self, batch: Batch, budget: int | str) -> list[Batch]:
        """Micro-batches of at most `budget` groups; "auto": of at most `AUTO_TOKENS` positions."""
        batch = replace(batch, content=replace(batch.content, layout=self.layout))
        auto = budget == "auto"
        if not auto and int(budget) >= batch.num_groups:
            return [batch]
        order = list(range(batch.num_groups))
        if not auto:
            order = self._sorted(order, batch) if self.by_length else order
            size = int(budget)
            pieces = [order[start : start + size] for start in range(0, len(order), size)]
        elif self.layout in PACKED:
            pieces = _filled(positions_of(batch.content, self.layout), AUTO_TOKENS)
        else:
            order = order if self.by_length is False else self._sorted(order, batch)
            pieces = _within(order, *_sizes(batch), AUTO_TOKENS)
        return [batch.select(piece) for piece in pieces]

    @staticmethod
    def _sorted(order: list[int], batch: Batch) -> list[int]:
        longest, _ = _sizes(batch)
        return sorted(order, key=lambda group: (longest[group], group))


def _sizes(batch: Batch) -> tuple[list[int], list[int]]:
    """Of each group: tokens of its longest answer with the prompt, and number of answers."""
    longest = [0] * batch.num_groups
    answers = [0] * batch.num_groups
    for group, length in zip(batch.group.tolist(), batch.content.lengths(), strict=True):
        longest[group] = max(longest[group], length)
        answers[group] += 1
    return longest, answers


def _filled(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Groups in their order, cut where their sum would pass the budget."""
    pieces: list[list[int]] = [[]]
    taken = 0
    for group, size in enumerate(sizes):
        if pieces[-1] and taken + size > budget:
            pieces.append([])
            taken = 0
        pieces[-1].append(group)
        taken += size
    return pieces


def _within(
    order: list[int], longest: list[int], answers: list[int], budget: int
) -> list[list[int]]:
    """Groups in their order, cut where the padded size would pass the budget."""
    pieces: list[list[int]] = [[]]
    rows, width = 0, 0
    for group in order:
        wider = max(width, longest[group])
        if pieces[-1] and (rows + answers[group]) * wider > budget:
            pieces.append([])
            rows, wider = 0, longest[group]
        pieces[-1].append(group)
        rows, width = rows + answers[group], wider
    return pieces
