"""What a model is apart from its weights, and how it came, so that it is given back as it came."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

_FLAGS = (
    "training",
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "_compiled_call_impl",
)
"""What training sets on modules; each of them is an attribute of the module itself or absent."""

_ABSENT = object()


class State:
    """The modes, gradient flags, checkpointing and compilation of a model at this moment.

    Args:
        model: whose state it is.
        gradients: whether gradient flags are part of it.
    """

    def __init__(self, model: nn.Module, *, gradients: bool = True) -> None:
        self.model = model
        self.training = model.training
        self.modules = [
            (module, {name: vars(module).get(name, _ABSENT) for name in _FLAGS})
            for module in model.modules()
        ]
        self.gradients = [(p, p.requires_grad) for p in model.parameters()] if gradients else []

    def restore(self) -> None:
        """Bring it back. Modules that were not there then take the mode of the whole model."""
        self.model.train(self.training)
        for module, flags in self.modules:
            for name, value in flags.items():
                if value is not _ABSENT:
                    setattr(module, name, value)
                else:
                    vars(module).pop(name, None)
        for parameter, flag in self.gradients:
            parameter.requires_grad_(flag)


def base_of(model: Any) -> Any:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def max_positions(model: Any) -> int | None:
    """How many tokens the model has positions for; None where its config names no limit."""
    found = getattr(base_of(model).config, "max_position_embeddings", None)
    return int(found) if found else None


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """What ends an answer: the generation config's tokens and the tokenizer's."""
    config = getattr(model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    listed = list(ids) if isinstance(ids, Iterable) else [ids]
    return [i for i in dict.fromkeys([*listed, tokenizer.eos_token_id]) if i is not None]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All of the model in eval mode: no dropout, and no checkpointing, which forbids the cache."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """The model without its compiled calls: every new length of a cache would compile anew."""
    held = [(m, m._compiled_call_impl) for m in model.modules() if m._compiled_call_impl]
    for module, _ in held:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in held:
            module._compiled_call_impl = call


def save_weights(model: Any, folder: Path, weights: Mapping[str, Tensor] | None) -> None:
    """As `save_pretrained`; that writes the architecture into the config, which is the caller's."""
    given = {} if weights is None else {"state_dict": dict(weights)}
    before = dict(vars(model.config))
    model.save_pretrained(folder, **given)
    vars(model.config).clear()
    vars(model.config).update(before)
