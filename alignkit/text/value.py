"""A critic on the policy's own trunk: one linear read-out of its hidden states."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from alignkit.errors import ConfigError
from alignkit.text.handed import base_of


class ValueHead(nn.Module):
    """value = w h + b of the state that a hidden state h stands for, in float32; 0 at the start.

    Args:
        width: of hidden states.
        device: of the policy.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.out = nn.Linear(width, 1, dtype=torch.float32, device=device)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.apart = False
        """Whether its gradient stops here and leaves the trunk alone."""

    def forward(self, hidden: Float[Tensor, "M H"]) -> Float[Tensor, " M"]:
        with torch.autocast(hidden.device.type, enabled=False):
            held = hidden.detach() if self.apart else hidden
            values: Tensor = self.out(held.float())
        return values.squeeze(-1)


def read_values(module: Any) -> ValueHead:
    """Put a head on a policy's trunk.

    Args:
        module: its likelihood module.

    Raises:
        ConfigError: the model does not show the states that it makes its logits of.
    """
    base = base_of(module.model)
    if not module.head.splits:
        raise ConfigError(
            f"critic='shared' reads values off the states that {type(base).__name__} makes its "
            "logits of, and this model's forward does not show them. Write critic='separate'."
        )
    embeddings = base.get_output_embeddings()
    module.value = ValueHead(embeddings.weight.shape[1], embeddings.weight.device)
    found: ValueHead = module.value
    return found
