"""What the text wing's modules have in common: how a language model computes a laid-out batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from alignkit.batches import Batch
from alignkit.text.attention import Row, configs_of, packed
from alignkit.text.content import TextContent
from alignkit.text.handed import base_of
from alignkit.text.kernels import PLAIN, Call
from alignkit.text.packing import Layout, Placed

Answer = TypeVar("Answer")


class TextModule(nn.Module):
    """A language model that computes batches of answers, whatever is read off of it.

    Args:
        model: a `PreTrainedModel` or `PeftModel`.
        autocast: the dtype to compute in, or None for the weights' own.

    Attributes:
        kernels: names of what computes the attention of packed rows.
        calls: where layers' attention is noted, if anybody asks.
    """

    def __init__(self, model: nn.Module, *, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast
        self.kernels: tuple[str, ...] = PLAIN
        self.calls: list[Call] | None = None
        forward = inspect.signature(base_of(model).forward)
        self.takes_positions = "position_ids" in forward.parameters
        self.train(False)
        self.configs = configs_of(model)

    def shard_units(self) -> list[nn.Module]:
        """The blocks that FSDP2 shards one by one: the repeated layers of the model."""
        return repeated_layers(self.model)

    def within(self, use: Callable[[nn.Module], Answer]) -> Answer:
        """Another use of the model than the module's own, such as sampling.

        FSDP2 takes this method for a forward: inside, the model's own weights are whole, and each
        block's are while it runs. All processes must call it alike.
        """
        with self._autocast(next(self.model.parameters()).device):
            return use(self.model)

    def per_token(self, batch: Batch) -> Tensor:
        """(N, K, ...) numbers of each token that show whether another layout computes the same."""
        raise NotImplementedError

    def _inputs(self, rows: Placed) -> dict[str, Any]:
        """What the model takes of a layout; a packed row is masked by its attention alone."""
        inputs = {"input_ids": rows.ids, "attention_mask": rows.attention().long()}
        if rows.host.groups:
            inputs["position_ids"] = rows.positions
        return inputs

    def _attention(self, rows: Placed) -> AbstractContextManager[None]:
        groups = rows.host.groups
        row = Row(groups, self.kernels, self.calls)
        return packed(self.configs, row) if groups else nullcontext()

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)


def work_of(content: TextContent, rows: Layout) -> dict[str, tuple[float, float]]:
    """Positions computed, beside real tokens and beside one padded rectangle."""
    lengths = content.lengths()
    padded = len(lengths) * max(lengths)
    return {
        "positions/per_token": (rows.ids.size, sum(lengths)),
        "positions/of_padded": (rows.ids.size, padded),
    }


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The members of the model's largest `nn.ModuleList`: its transformer blocks.

    The largest by parameters: the experts inside a block may be more, but not larger.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=[]))
