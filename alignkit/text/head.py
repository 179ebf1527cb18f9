"""From hidden states to log-probabilities of tokens, at the positions that predict a scored one.

The model's decoder runs over whole rows; what comes after it (scaling, head, bias, soft-capping) is
the model's own forward once more, with the decoder's result in place of the decoder. Nothing of it
is written down here, so that any model's head is its own. A model whose forward is more than that
is found by a comparison when it is loaded, and then computes its logits as it does by itself.

Where the logits of a micro-batch would pass a budget they are made in chunks, and made again in
backward.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignkit.losses.modifiers import token_alignment
from alignkit.text.handed import base_of

LOGITS = 2**28
"""Logits that are kept for backward, at most: 1 GB of float32."""
CHUNK = {"cpu": 2**22}
"""By device, logits that are made at a time where all would be too many."""
BLOCK = {"cpu": 2**19}
"""By device, elements that pointwise work is done on at a time: a core's cache holds them."""


class TokenLogps(torch.autograd.Function):
    """log softmax(logits)[target] in float32: (M,) of (M, V).

    What is kept for backward is the logits and a number per row, and the gradient is the one
    further tensor of their size that is made:

        d / d logits = onehot(target) - softmax(logits)
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        lse = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        for rows in _blocks(logits):
            torch.logsumexp(logits[rows].float(), -1, out=lse[rows])
        ctx.save_for_backward(logits, targets, lse)
        return logits.gather(-1, targets[:, None]).squeeze(-1).float() - lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets, lse = ctx.saved_tensors
        found = torch.empty_like(logits)
        for rows in _blocks(logits):
            slope = grad[rows, None]
            part = found[rows] if found.dtype == torch.float32 else found[rows].float()
            torch.sub(logits[rows], lse[rows, None], out=part).exp_().mul_(-slope)
            part.scatter_add_(-1, targets[rows, None], slope)
            if found.dtype != torch.float32:
                found[rows] = part
        return found, None


class TokenEntropy(torch.autograd.Function):
    """H = -sum_v p(v) ln p(v), p = softmax(logits), in float32: (M,) of (M, V).

    Kept for backward are the logits and two numbers per row:

        d H / d logits = -p (ln p + H)
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        lse = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        found = torch.empty_like(lse)
        for rows in _blocks(logits):
            torch.logsumexp(logits[rows].float(), -1, out=lse[rows])
            logps = logits[rows].float() - lse[rows, None]
            # A logit of minus infinity is a token that cannot come, and adds nothing.
            found[rows] = -(logps.exp() * logps.clamp(min=torch.finfo(logps.dtype).min)).sum(-1)
        ctx.save_for_backward(logits, lse, found)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        logits, lse, entropy = ctx.saved_tensors
        found = torch.empty_like(logits)
        for rows in _blocks(logits):
            logps = (logits[rows].float() - lse[rows, None]).clamp(min=torch.finfo().min)
            slope = logps.exp() * (logps + entropy[rows, None])
            found[rows] = (slope * -grad[rows, None]).to(found.dtype)
        return found


def _blocks(logits: Tensor) -> list[slice]:
    """Rows of a matrix, in blocks that fit the device's cache."""
    rows, size = logits.shape
    step = max(1, BLOCK.get(logits.device.type, 2**26) // size)
    return [slice(start, start + step) for start in range(0, rows, step)]


@torch.no_grad()
def alignment_of(logps: Tensor, logits: Tensor) -> Float[Tensor, " M"]:
    """`token_alignment`, a few rows at a time: what is made on the way is as large as they are."""
    return torch.cat([token_alignment(logps[rows], logits[rows]) for rows in _blocks(logits)])


@torch.no_grad()
def correct_of(logits: Tensor, targets: Tensor) -> Float[Tensor, " M"]:
    """1 where the target is the likeliest token, else 0."""
    return (logits.argmax(-1) == targets).float()


Found = dict[str, Float[Tensor, " M"]]
"""Of each token: "logps", and what else was asked for."""


def score(logits: Float[Tensor, "M V"], targets: Int[Tensor, " M"], want: Collection[str]) -> Found:
    found = {"logps": TokenLogps.apply(logits, targets)}
    if "entropy" in want:
        found["entropy"] = TokenEntropy.apply(logits)
    if "alignment" in want:
        found["alignment"] = alignment_of(found["logps"], logits)
    if "correct" in want:
        found["correct"] = correct_of(logits, targets)
    return found


class Head:
    """What of a causal language model comes after its decoder.

    Args:
        model: a `PreTrainedModel` or `PeftModel`, in eval mode.

    Attributes:
        splits: whether the model is its decoder and what comes after it, one after the other.
        vocabulary: how many logits there are.
        temperature: what logits are divided by: the likelihood is that of answers sampled so.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        forward = inspect.signature(base_of(model).forward).parameters
        self.takes_places = "logits_to_keep" in forward
        self.vocabulary = 0
        self.temperature = 1.0
        self.splits = self._compared()

    def __call__(
        self,
        inputs: Mapping[str, Any],
        places: Int[Tensor, " M"],
        targets: Int[Tensor, " M"],
        want: Collection[str] = (),
    ) -> Found:
        """What rows of tokens predict.

        Args:
            inputs: of the model: (R, T) ids, and what else it takes.
            places: of the flattened rows, in 0 .. R T - 1.
            targets: the tokens after them.
            want: of "alignment", "correct" and "entropy", what is wanted of them, too; or "hidden",
                (M, H) the states that predict them.
        """
        if not self.splits:
            assert "hidden" not in want, "this model's forward does not show them"
            return score(self._tempered(self._whole(inputs, places)), targets, want)
        decoded = self._decoder(use_cache=False, **inputs)
        hidden = decoded.last_hidden_state.flatten(0, 1)[places]

        def part(hidden: Tensor, targets: Tensor) -> Found:
            return score(self._tempered(self._after(decoded, hidden)), targets, want)

        states = {"hidden": hidden} if "hidden" in want else {}
        step = self._step(len(targets), targets.device)
        if step >= len(targets):
            return part(hidden, targets) | states
        pieces = zip(hidden.split(step), targets.split(step), strict=True)
        if torch.is_grad_enabled():
            recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            found = [recomputed(part, *piece) for piece in pieces]
        else:
            found = [part(*piece) for piece in pieces]
        return {name: torch.cat([one[name] for one in found]) for name in found[0]} | states

    def _tempered(self, logits: Tensor) -> Tensor:
        return logits if self.temperature == 1 else logits / self.temperature

    def _step(self, rows: int, device: torch.device) -> int:
        """Rows whose logits are made at a time; the same with and without gradients."""
        if rows * self.vocabulary <= LOGITS:
            return max(rows, 1)
        return max(1, CHUNK.get(device.type, 2**26) // self.vocabulary)

    @property
    def _decoder(self) -> Any:
        return getattr(base_of(self.model), base_of(self.model).base_model_prefix)

    def _after(self, decoded: Any, hidden: Float[Tensor, "M H"]) -> Float[Tensor, "M V"]:
        """The model's logits for some of its decoder's hidden states: its forward, with them in
        the decoder's place.
        """
        base = base_of(self.model)
        result = copy.copy(decoded)
        result.last_hidden_state = hidden[None]
        after = copy.copy(base)  # of the module, not of its parts
        vars(after)["_modules"] = base._modules | {base.base_model_prefix: _Given(result)}
        ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
        logits: Tensor = type(base).forward(after, input_ids=ids, use_cache=False).logits
        return logits[0]

    def _whole(self, inputs: Mapping[str, Any], places: Tensor) -> Float[Tensor, "M V"]:
        """The model's logits as it makes them by itself."""
        rows = inputs["input_ids"].shape[0]
        if self.takes_places and rows == 1:
            logits: Tensor = self.model(use_cache=False, logits_to_keep=places, **inputs).logits
            return logits[0]
        return self.model(use_cache=False, **inputs).logits.flatten(0, 1)[places]

    @torch.no_grad()
    def _compared(self) -> bool:
        """Whether decoder and head give what the model gives, on a few tokens."""
        base = base_of(self.model)
        device = next(self.model.parameters()).device
        ids = torch.arange(6, device=device)[None] % base.get_input_embeddings().weight.shape[0]
        expected = self.model(input_ids=ids, use_cache=False).logits
        self.vocabulary = expected.shape[-1]
        try:
            decoded = self._decoder(input_ids=ids, use_cache=False)
            found = self._after(decoded, decoded.last_hidden_state[0])
        except Exception:
            return False
        same = found.shape == expected[0].shape
        return same and torch.allclose(found, expected[0], rtol=1e-5, atol=1e-5, equal_nan=True)


class _Given(nn.Module):
    """Stands in a decoder's place and gives what that gave."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.result
