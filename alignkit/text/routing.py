"""The load-balancing loss of mixtures of experts, as each model defines it.

    loss = E sum_e f_e P_e        Switch Transformers (Fedus et al. 2021, 2101.03961) Eq. 4 to 6

E experts, f_e the share of (token, choice) pairs routed to e times the choices per token, P_e the
mean probability that the router gives e, both over layers and the tokens that the forward runs
over. The function is the model's own. Padding does not count, nor does what is no input: the last
token of an answer, and of a packed prompt the copies beside the one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.errors import ConfigError
from alignkit.text.handed import base_of


class Routers:
    """The routers of a model.

    Args:
        model: a `PreTrainedModel` or `PeftModel`; a dense one has none.
    """

    def __init__(self, model: nn.Module) -> None:
        base = base_of(model)
        self.base: Any = base
        recorded = (getattr(base, "_can_record_outputs", None) or {}).get("router_logits")
        kind = getattr(recorded, "target_class", recorded)
        self.place = getattr(recorded, "index", 0)
        self.modules = [m for m in model.modules() if isinstance(kind, type) and type(m) is kind]
        self.function = getattr(
            sys.modules[type(base).__module__], "load_balancing_loss_func", None
        )
        self._logits: list[Tensor] | None = None

    def coefficient(self, wanted: float | str) -> float:
        """The given coefficient, or for "model" that of the model's config.

        Raises:
            ConfigError: for a model without experts.
        """
        own = getattr(self.base, "router_aux_loss_coef", None)
        if not self.modules or self.function is None or own is None:
            raise ConfigError(
                f"trainer.router_aux_loss_coef={wanted!r} balances the experts of a mixture, and "
                f"{type(self.base).__name__} has none with a load-balancing loss. Leave it out."
            )
        return float(own if wanted == "model" else wanted)

    @contextmanager
    def recorded(self, wanted: bool) -> Iterator[None]:
        """Inside, the model's forward leaves its routers' logits for `loss`.

        Recomputed blocks run their hooks again, in backward, when nothing listens any more.
        """
        if not wanted:
            yield
            return
        logits: list[Tensor] = []
        self._logits = logits

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            logits.append(output[self.place] if isinstance(output, tuple) else output)

        hooks = [module.register_forward_hook(note) for module in self.modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def loss(self, real: Tensor) -> Tensor:
        """() the loss of the forward that was recorded.

        Args:
            real: (R, T) bool, True on real tokens.
        """
        assert self._logits is not None and self.function is not None
        assert len(self._logits) == len(self.modules), "one forward, each router once"
        logits, self._logits = self._logits, None
        experts = logits[0].shape[-1]
        flat = tuple(one.reshape(-1, experts) for one in logits)
        top = self.base.config.num_experts_per_tok
        found: Tensor = self.function(flat, experts, top, real.long())
        return found.to(torch.float32)
