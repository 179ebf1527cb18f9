"""Log-likelihoods of completions under a causal language model.

    logps(y | x) = sum_t log p(y_t | x, y_<t)        nats, over completion tokens, closing eos
    included

The log-softmax is in float32 whatever the model's dtype. Dropout is off: the model is evaluated in
eval mode whatever its config says.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from alignkit.batches import Batch, Likelihood
from alignkit.losses.modifiers import token_alignment
from alignkit.protocols import Draw, Key
from alignkit.text.content import pad_rows
from alignkit.text.handed import base_of, evaluating

Answer = TypeVar("Answer")
EXTRAS = frozenset({"token_logps", "token_mask", "public", "alignment"})


class TextLikelihood(nn.Module):
    """The likelihood module of a causal LM: its forward is the likelihood.

    Args:
        model: a `PreTrainedModel` or `PeftModel` with a language-model head.
        autocast: the dtype to compute in, or None for the weights' own.
    """

    def __init__(self, model: nn.Module, *, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast
        forward = inspect.signature(base_of(model).forward)
        self.takes_logits_to_keep = "logits_to_keep" in forward.parameters
        self.train(False)

    def shard_units(self) -> list[nn.Module]:
        """The blocks that FSDP2 shards one by one: the repeated layers of the model."""
        return repeated_layers(self.model)

    def within(self, use: Callable[[nn.Module], Answer]) -> Answer:
        """Another use of the model than its likelihood, such as sampling.

        FSDP2 takes this method for a forward: inside, the model's own weights are whole, and each
        block's are while it runs. All processes must call it alike.
        """
        return use(self.model)

    def forward(
        self, batch: Batch, draw: Draw = None, want: frozenset[str] = frozenset()
    ) -> Likelihood:
        """Likelihood of the N answers.

        Extras: "token_logps" (N, K) float32 and "token_mask" (N, K); "public" (N,), the
        log-likelihood of the first k tokens of each answer, k the shortest length in its group, so
        that `total` less it is the rest's (LD-DPO); "alignment" (N,), detached, the mean over an
        answer's tokens of ln p(token) - ln sum_v p(v)^2 (WPO).
        """
        unknown = want - EXTRAS
        if unknown:
            raise ValueError(
                f"The text likelihood has no extra {sorted(unknown)}; it has {sorted(EXTRAS)}."
            )
        # Given back to its owner, the model may be in train mode again.
        with evaluating(self.model) if self.model.training else nullcontext():
            return self._likelihood(batch, want)

    def _likelihood(self, batch: Batch, want: frozenset[str]) -> Likelihood:
        device = next(self.model.parameters()).device
        rows = pad_rows(batch.content).to(device)
        # Position s predicts token s + 1, so the last position and those before start - 1 are not
        # needed: the head runs on K of the S positions.
        keep = rows.ids.shape[1] - rows.start + 1
        with self._autocast(device):
            logits = self._logits(rows.ids, rows.attention, keep)[:, :-1]  # (N, K, V)
        token_logps = gather_logps(logits, rows.ids[:, rows.start :])  # (N, K)
        token_logps = token_logps.masked_fill(~rows.completion, 0.0)
        made = {
            "token_logps": lambda: token_logps,
            "token_mask": lambda: rows.completion,
            "public": lambda: public_logps(token_logps, rows.completion, batch),
            "alignment": lambda: mean_alignment(token_logps, rows.completion, logits),
        }
        return Likelihood(
            total=token_logps.sum(-1),
            length=rows.completion.sum(-1).float(),
            extras={name: made[name]() for name in want},
        )

    def _logits(self, ids: Tensor, attention: Tensor, keep: int) -> Tensor:
        kept: dict[str, Any] = {"logits_to_keep": keep} if self.takes_logits_to_keep else {}
        logits = self.model(
            input_ids=ids, attention_mask=attention.long(), use_cache=False, **kept
        ).logits
        return logits[:, -keep:]

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)


def gather_logps(logits: Float[Tensor, "N K V"], ids: Tensor) -> Float[Tensor, "N K"]:
    """log softmax(logits)[id] in float32, without a second (N, K, V) tensor."""
    logits = logits.float()
    picked = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return picked - logits.logsumexp(-1)


def public_logps(
    token_logps: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"], batch: Batch
) -> Float[Tensor, " N"]:
    """Sum over the first k completion tokens of each answer, k the shortest length in its group."""
    lengths, group = mask.sum(-1), batch.group.to(mask.device)
    shortest = lengths.new_zeros(batch.num_groups)
    shortest = shortest.scatter_reduce(0, group, lengths, "amin", include_self=False)
    place = mask.cumsum(-1)  # 1 for the first completion token
    return torch.where(mask & (place <= shortest[group][:, None]), token_logps, 0.0).sum(-1)


@torch.no_grad()
def mean_alignment(
    token_logps: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"], logits: Float[Tensor, "N K V"]
) -> Float[Tensor, " N"]:
    """Mean over an answer's tokens of ln p(token) - ln sum_v p(v)^2, detached.

    Row by row: what is made on the way is as large as one answer's logits.
    """
    alignment = torch.stack(list(map(token_alignment, token_logps, logits)))  # (N, K)
    return torch.where(mask, alignment, 0.0).sum(-1) / mask.sum(-1)


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The members of the model's largest `nn.ModuleList`: its transformer blocks.

    The largest by parameters: the experts inside a block may be more, but not larger.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=[]))


class TextBackend:
    """Evaluates answers under the policy. Text needs no draw: its likelihood is deterministic.

    Attributes:
        module: the policy's likelihood module, wrapped or not.
        packing: "bucket" puts groups of like length together, so that little padding is computed;
            "none" keeps their order; "auto" buckets where micro-batches are "auto", too.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: nn.Module = module
        self.packing = "auto"

    def draw(self, batch: Batch, key: Key) -> Draw:
        return None

    def split(self, batch: Batch, budget: int | str) -> list[Batch]:
        """Micro-batches of at most `budget` groups; "auto": of at most `AUTO_TOKENS` tokens."""
        auto = budget == "auto"
        if not auto and int(budget) >= batch.num_groups:
            return [batch]
        longest, answers = _sizes(batch)
        order = list(range(batch.num_groups))
        if self.packing == "bucket" or (self.packing == "auto" and auto):
            order.sort(key=lambda group: (longest[group], group))
        if not auto:
            size = int(budget)
            pieces = [order[start : start + size] for start in range(0, len(order), size)]
        else:
            pieces = _within(order, longest, answers, AUTO_TOKENS)
        return [batch.select(piece) for piece in pieces]


AUTO_TOKENS = 8192
"""Padded tokens per micro-batch for "auto": 1 GB of float32 logits at a vocabulary of 32,000."""


def _sizes(batch: Batch) -> tuple[list[int], list[int]]:
    """Of each group: tokens of its longest answer with the prompt, and number of answers."""
    longest = [0] * batch.num_groups
    answers = [0] * batch.num_groups
    for group, length in zip(batch.group.tolist(), batch.content.lengths(), strict=True):
        longest[group] = max(longest[group], length)
        answers[group] += 1
    return longest, answers


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
