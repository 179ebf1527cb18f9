"""Losses of demonstrations: one log-likelihood per token in, one loss per token out.

There is no reference and no comparison, so they stand in a table of their own. `x` is a log-
likelihood, ln p of a token; an image is one token. The objective adds them up and divides once by
the number of scored tokens of the global batch, so that a long answer counts by its tokens:

    loss = sum over rows i, tokens t of w_i f(x_it) / sum over rows i of w_i n_i
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor


def nll(logps: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Negative log-likelihood: -x.

    Ouyang et al. 2022 (2203.02155), step 1. Its gradient with respect to a token's logits is
    softmax - onehot, so that a token is learned as long as it is not certain.

    Args:
        logps: log-likelihoods, of tokens or of whole answers.

    Returns:
        Losses of the same shape.
    """
    return -logps


def dft(logps: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Dynamic fine-tuning: -sg(e^x) x, sg without gradient.

    Wu et al. 2025 (2508.05629). Read as a policy gradient, `nll` gives each demonstrated
    token a reward of 1/p; this weighs it by p, which leaves a reward of 1. The gradient is that of
    -e^x, so that tokens the model holds for impossible are not learned at any price.

    Args:
        logps: log-likelihoods of tokens.

    Returns:
        Losses of the same shape.
    """
    return -logps.detach().exp() * logps


@dataclass(frozen=True)
class SupervisedLoss:
    """A row of the table; called like its function.

    Attributes:
        name: the name users write.
        function: `(logps) -> losses`, elementwise.
        paper: where it comes from.
        equation: the formula per token.
        golden: mean over the tokens of the table's example: x = -0.5, -1, -2 and -0.1, -0.2.
        minimiser: where the expected loss of one token is smallest, in words.
        additive: whether the loss of a sum is the sum of the losses, so that an answer's whole
            likelihood is enough, and an image's.
        keywords, needs: as in `Loss`: no options, no columns.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    paper: str
    equation: str
    golden: float
    minimiser: str
    additive: bool

    keywords: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, logps: Tensor) -> Tensor:
        return self.function(logps)


ROWS = (
    SupervisedLoss(
        name="nll",
        function=nll,
        paper="Ouyang et al. 2022, InstructGPT, arXiv:2203.02155",
        equation="-x",
        golden=0.76,
        minimiser="the data's distribution over tokens",
        additive=True,
    ),
    SupervisedLoss(
        name="dft",
        function=dft,
        paper="Wu et al. 2025, Dynamic Fine-Tuning, arXiv:2508.05629",
        equation="-sg(e^x) x",
        golden=0.2392090,
        minimiser="all mass on the likeliest token, by the gradient of -e^x",
        additive=False,
    ),
)

SUPERVISED_LOSSES: Mapping[str, SupervisedLoss] = MappingProxyType({row.name: row for row in ROWS})
"""Name -> loss of demonstrations."""
