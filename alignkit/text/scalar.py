"""Scores of answers: a language model's trunk with a small head, in the format of
`AutoModelForSequenceClassification`.

    score(x, y)     = head(h_T)      h_T the hidden state after the last token of [x; y]
    value(x, y, t)  = head(h_{t-1})  of the state before token t, which predicts that token

The head is applied in float32 whatever the model's dtype, and dropout is off. Layouts are the
policy's: a prompt is computed once for all of its answers, and nothing is found by a pad id.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from alignkit.batches import Batch, Likelihood
from alignkit.text.handed import base_of, evaluating
from alignkit.text.module import TextModule, work_of
from alignkit.text.packing import Placed, lay_out

HEAD = "score"
"""What transformers calls the head of a decoder that classifies sequences."""
EXTRAS = frozenset({"values", "token_mask", "logits", "hidden"})


class TextScalar(TextModule):
    """The module of a reward model or a critic: its forward scores answers.

    Args:
        model: a decoder of the classes that `AutoModelForSequenceClassification` loads, or a
            `PeftModel` of one.
        autocast: the dtype to compute in, or None for the weights' own.
        ordinal: whether the head's K - 1 outputs are the logits of "more than k", whose
            probabilities add up to the score; else there is one, and it is the score.
        scale, offset: what the head gives is multiplied by and then added, such as the spread and
            the mean of the ratings.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        autocast: torch.dtype | None = None,
        ordinal: bool = False,
        scale: float = 1.0,
        offset: float = 0.0,
    ) -> None:
        super().__init__(model, autocast=autocast)
        self.ordinal = ordinal
        self.scale = scale
        self.offset = offset
        base = base_of(model)
        getattr(base, HEAD).float()
        width = base.config.num_labels
        assert ordinal or width == 1, f"a scalar head with {width} outputs"

    def forward(
        self, batch: Batch, draw: None = None, want: frozenset[str] = frozenset()
    ) -> Likelihood:
        """Scores of the N answers in the place of likelihoods, float32.

        Extras: "values" (N, K), the value of the state before each completion token, 0 where
        "token_mask" (N, K) is False, both by place in the completion as the policy's "token_logps";
        `total` is the value after the last token. "logits" (N, C), what the head gives there;
        "hidden" (N, K, H), the states that values are read off.
        """
        unknown = want - EXTRAS
        if unknown:
            raise ValueError(
                f"The scores of text have no extra {sorted(unknown)}; they have {sorted(EXTRAS)}."
            )
        assert draw is None, "scores take no draw"
        with evaluating(self.model) if self.model.training else nullcontext():
            return self._scores(batch, want)

    def _scores(self, batch: Batch, want: frozenset[str]) -> Likelihood:
        device = next(self.model.parameters()).device
        rows = lay_out(batch.content, whole=True).to(device)
        with self._autocast(device), self._attention(rows):
            hidden = self._trunk(**self._inputs(rows), use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1)
        # One product for all, so that a value and a score of the same state are the same number.
        places = torch.cat([rows.lasts, rows.predicts]) if "values" in want else rows.lasts
        logits = self._head(hidden[places])
        last, before = logits[: len(rows.lasts)], logits[len(rows.lasts) :]
        made = {
            "values": lambda: rows.table(self._score(before)),
            "token_mask": rows.mask,
            "logits": lambda: last,
            "hidden": lambda: _by_token(rows, hidden[rows.predicts]),
        }
        return Likelihood(
            total=self._score(last),
            length=rows.lengths.float(),
            extras={name: made[name]() for name in want},
            work=work_of(batch.content, rows.host),
        )

    @property
    def _trunk(self) -> Any:
        base = base_of(self.model)
        return getattr(base, base.base_model_prefix)

    def _head(self, hidden: Float[Tensor, "M H"]) -> Float[Tensor, "M C"]:
        with torch.autocast(hidden.device.type, enabled=False):
            logits: Tensor = getattr(base_of(self.model), HEAD)(hidden.float())
        return logits

    def _score(self, logits: Float[Tensor, "M C"]) -> Float[Tensor, " M"]:
        plain = logits.sigmoid().sum(-1) if self.ordinal else logits.squeeze(-1)
        return self.scale * plain + self.offset

    def per_token(self, batch: Batch) -> Tensor:
        """Hidden states, in units of their spread."""
        found: Likelihood = self(batch, want=frozenset({"hidden"}))
        hidden = found.extras["hidden"].float()
        return hidden / hidden.std()


def _by_token(rows: Placed, values: Float[Tensor, "M H"]) -> Float[Tensor, "N K H"]:
    num, width = len(rows.host.lengths), rows.host.width
    table = values.new_zeros(num * width, values.shape[1])
    return table.index_copy(0, rows.cells, values).view(num, width, -1)
