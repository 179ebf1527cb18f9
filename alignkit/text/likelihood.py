"""Log-likelihoods of completions under a causal language model.

    logps(y | x) = sum_t log p(y_t | x, y_<t)        nats, over completion tokens, closing eos
    included

The log-softmax is in float32 whatever the model's dtype. Dropout is off: the model is evaluated in
eval mode whatever its config says.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from alignkit.batches import Batch, Likelihood
from alignkit.text.handed import evaluating
from alignkit.text.head import Head
from alignkit.text.module import TextModule, work_of
from alignkit.text.noise import EmbeddingNoise, added
from alignkit.text.packing import Placed, lay_out, stretches
from alignkit.text.routing import Routers
from alignkit.text.value import ValueHead

EXTRAS = frozenset(
    {"token_logps", "token_mask", "public", "alignment", "correct", "router", "entropy"}
)
VALUES = frozenset({"values"})
"""What there is besides, where a critic reads the policy's states."""


class TextLikelihood(TextModule):
    """The likelihood module of a causal LM: its forward is the likelihood.

    Args:
        model: a `PreTrainedModel` or `PeftModel` with a language-model head.
        autocast: the dtype to compute in, or None for the weights' own.

    Attributes:
        value: a head that reads values off the policy's own hidden states, or None.
    """

    def __init__(self, model: nn.Module, *, autocast: torch.dtype | None = None) -> None:
        super().__init__(model, autocast=autocast)
        self.head = Head(model)
        self.routers = Routers(model)
        self.value: ValueHead | None = None

    def forward(
        self,
        batch: Batch,
        draw: EmbeddingNoise | None = None,
        want: frozenset[str] = frozenset(),
    ) -> Likelihood:
        """Likelihood of the N answers, computed in the layout that their content names; a draw is
        noise on the embeddings.

        Extras: "token_logps" (N, K) float32, 0 where "token_mask" (N, K) is False, by place in
        the completion; "public" (N,), the log-likelihood of the first k scored tokens of each
        answer, k the shortest length in its group, so that `total` less it is the rest's (LD-DPO);
        "alignment" (N,), detached, the mean over an answer's tokens of ln p(token) -
        ln sum_v p(v)^2 (WPO); "correct" (N,), how many scored tokens are the likeliest at their
        place; "router" (N,), the load-balancing loss of the batch's experts; "entropy" (N, K), of
        the next token's distribution; "values" (N, K), of the state before each token.
        """
        known = EXTRAS if self.value is None else EXTRAS | VALUES
        if unknown := want - known:
            raise ValueError(
                f"The text likelihood has no extra {sorted(unknown)}; it has {sorted(known)}."
            )
        # Given back to its owner, the model may be in train mode again.
        with evaluating(self.model) if self.model.training else nullcontext():
            return self._likelihood(batch, draw, want)

    def _likelihood(
        self, batch: Batch, draw: EmbeddingNoise | None, want: frozenset[str]
    ) -> Likelihood:
        device = next(self.model.parameters()).device
        rows = lay_out(batch.content).to(device)
        routed = self.routers.recorded("router" in want)
        noise = self._noise(draw, batch, rows)
        with self._autocast(device), self._attention(rows), noise, routed:
            asked = want | {"hidden"} if VALUES & want else want
            found = self.head(self._inputs(rows), rows.predicts, rows.targets, asked)
        token_logps, mask = rows.table(found["logps"]), rows.mask()  # (N, K)
        made = {
            "token_logps": lambda: token_logps,
            "token_mask": lambda: mask,
            "public": lambda: public_logps(token_logps, mask, batch),
            "alignment": lambda: per_answer(rows, found["alignment"]) / rows.lengths.clamp(min=1),
            "correct": lambda: per_answer(rows, found["correct"]),
            "entropy": lambda: rows.table(found["entropy"]),
            "values": lambda: rows.table(self._values(found["hidden"])),
            "router": lambda: self.routers.loss(rows.attention()).expand(len(rows.lengths)),
        }
        return Likelihood(
            total=token_logps.sum(-1),
            length=rows.lengths.float(),
            extras={name: made[name]() for name in want},
            work=work_of(batch.content, rows.host),
        )

    def _values(self, hidden: Float[Tensor, "M H"]) -> Float[Tensor, " M"]:
        assert self.value is not None
        values: Tensor = self.value(hidden)
        return values

    def _noise(
        self, draw: EmbeddingNoise | None, batch: Batch, rows: Placed
    ) -> AbstractContextManager[None]:
        if draw is None:
            return nullcontext()
        made = partial(draw.laid_out, stretches(rows.host), batch.content.lengths())
        return added(self.model, made)

    def per_token(self, batch: Batch) -> Tensor:
        found: Likelihood = self(batch, want=frozenset({"token_logps"}))
        return found.extras["token_logps"]


def public_logps(
    token_logps: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"], batch: Batch
) -> Float[Tensor, " N"]:
    """Sum over the first k completion tokens of each answer, k the shortest length in its group."""
    lengths, group = mask.sum(-1), batch.group.to(mask.device)
    shortest = lengths.new_zeros(batch.num_groups)
    shortest = shortest.scatter_reduce(0, group, lengths, "amin", include_self=False)
    place = mask.cumsum(-1)  # 1 for the first scored token
    return torch.where(mask & (place <= shortest[group][:, None]), token_logps, 0.0).sum(-1)


def per_answer(rows: Placed, values: Float[Tensor, " M"]) -> Float[Tensor, " N"]:
    """Of each answer, the sum over its scored tokens."""
    return rows.table(values).sum(-1)
