"""NEFTune: uniform noise on the embeddings of training forwards (Jain et al. 2023, 2310.05914).

    embedding + u alpha / sqrt(L d)        u uniform on (-1, 1), L the row's own tokens, d the width

The noise of a row is keyed by (seed, optimizer step, position in the global batch): neither a
split into micro-batches nor a layout of rows changes it. It is a wing's `draw`, so that evaluation,
whose step is 0, has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from alignkit.batches import Batch
from alignkit.draws import generator
from alignkit.errors import ConfigError
from alignkit.protocols import Key
from alignkit.text.packing import Stretch


@dataclass(frozen=True)
class EmbeddingNoise:
    """The noise of one micro-batch.

    Attributes:
        alpha: its strength.
        key: (seed, step).
        positions: of each answer, its group's in the global batch.
    """

    alpha: float
    key: Key
    positions: tuple[int, ...]

    @classmethod
    def of(cls, alpha: float, batch: Batch, key: Key) -> EmbeddingNoise:
        return cls(alpha, key, tuple(batch.position[batch.group].tolist()))

    def row(self, answer: int, length: int, width: int) -> Float[Tensor, "L D"]:
        """The noise of one answer with its prompt, in float32 on the CPU."""
        drawn = generator("neftune", *self.key, self.positions[answer])
        uniform = torch.from_numpy(drawn.random((length, width), dtype="float32"))
        return (2 * uniform - 1) * (self.alpha / (length * width) ** 0.5)

    def laid_out(
        self, stretches: Sequence[Stretch], lengths: Sequence[int], embedded: Tensor
    ) -> Tensor:
        """The noise of all answers where their embeddings are; 0 elsewhere.

        Args:
            stretches: where each answer with its prompt lies; a layout may leave out its end.
            lengths: its tokens, all of them.
            embedded: (R, T, D).
        """
        noise = torch.zeros(embedded.shape)
        for answer, (row, first, kept) in enumerate(stretches):
            drawn = self.row(answer, lengths[answer], embedded.shape[-1])
            noise[row, first : first + kept] = drawn[:kept]
        return noise.to(embedded)


def embedding_of(model: Any) -> nn.Module:
    """The module whose output gets the noise.

    Raises:
        ConfigError: if the model does not tell.
    """
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        found = None
    if not isinstance(found, nn.Module):
        raise ConfigError(
            "method.neftune_alpha adds noise to the output of the model's embedding, and "
            f"{type(model).__name__} does not say which module that is. Leave neftune_alpha out."
        )
    return found


@contextmanager
def added(model: Any, make: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, what `make` gives is added to the embeddings of one forward."""
    calls = []

    def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append(module)
        return output + make(output)

    hook = embedding_of(model).register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
    if len(calls) != 1:
        raise ConfigError(
            "method.neftune_alpha adds noise to the output of the model's embedding once a "
            f"forward, and that of {type(model).__name__} ran {len(calls)} times. Leave "
            "neftune_alpha out."
        )
