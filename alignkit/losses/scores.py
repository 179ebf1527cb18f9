"""What losses spend: a few numbers per example, and nothing of the model that made them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor


def check_equal_shapes(owner: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all given tensors are vectors of the same length.

    A (4, 1) tensor against a (4,) one would broadcast to (4, 4) and train on nonsense in silence.
    """
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if t is not None}
    # Named against a proper vector where there is one.
    good_name = next(
        (name for name, shape in shapes.items() if len(shape) == 1), next(iter(shapes))
    )
    good = shapes[good_name]
    for name, shape in shapes.items():
        if len(shape) != 1 or shape != good:
            raise ValueError(
                f"{owner} needs vectors of one length, (B,); got {good_name} {good} and "
                f"{name} {shape}. Squeeze or gather them to the same (B,) first."
            )


def needed(scores: Any, *names: str, by: str) -> tuple[Tensor, ...]:
    """The optional fields that a loss cannot do without.

    Raises:
        ValueError: naming the missing field and the loss.
    """
    for name in names:
        if getattr(scores, name) is None:
            raise ValueError(
                f"{by} needs `{name}`, and the scores have none. Give {' and '.join(names)} in "
                f"{type(scores).__name__} (from the data's columns), or take another loss."
            )
    return tuple(getattr(scores, name) for name in names)


@dataclass(frozen=True)
class PairScores:
    """Log-likelihoods of B preference pairs, float32.

    Attributes:
        policy_chosen, policy_rejected: (B,) log-likelihoods under the policy.
        reference_chosen, reference_rejected: (B,) under the reference; zeros for losses without
            one.
        chosen_length, rejected_length: (B,) completion tokens, where a loss averages per token.
        weight: (B,) applied by the objective, not by the loss.
        target_margin: (B,) offset that the data asks for; subtracted from the logit after beta.
        p_chosen: (B,) probability that the chosen answer is the better one; None is 1.
        score_chosen, score_rejected: (B,) what a reward or a rater gave; swapping the label leaves
            them, like `target_margin`, with the labelled winner.
        uniform: (B,) in [0, 1), one number of each pair's own draw, for losses that sample pairs.
    """

    policy_chosen: Float[Tensor, " B"]
    policy_rejected: Float[Tensor, " B"]
    reference_chosen: Float[Tensor, " B"]
    reference_rejected: Float[Tensor, " B"]
    chosen_length: Float[Tensor, " B"] | None = None
    rejected_length: Float[Tensor, " B"] | None = None
    weight: Float[Tensor, " B"] | None = None
    target_margin: Float[Tensor, " B"] | None = None
    p_chosen: Float[Tensor, " B"] | None = None
    score_chosen: Float[Tensor, " B"] | None = None
    score_rejected: Float[Tensor, " B"] | None = None
    uniform: Float[Tensor, " B"] | None = None

    def __post_init__(self) -> None:
        check_equal_shapes("PairScores", **vars(self))

    @property
    def chosen(self) -> Float[Tensor, " B"]:
        """Log-ratio of policy to reference on the chosen answers."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected(self) -> Float[Tensor, " B"]:
        """Log-ratio of policy to reference on the rejected answers."""
        return self.policy_rejected - self.reference_rejected

    @property
    def margin(self) -> Float[Tensor, " B"]:
        """Chosen minus rejected log-ratio; times beta it is the DPO logit."""
        return self.chosen - self.rejected

    def logit(self, beta: float) -> Float[Tensor, " B"]:
        """b h - m, which every margin loss is a function of."""
        return self.offset(beta * self.margin)

    def offset(self, logit: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """A preference logit less the pair's target margin."""
        return logit if self.target_margin is None else logit - self.target_margin

    def swapped(self) -> PairScores:
        """The same pairs with the opposite label.

        `target_margin` still favours the labelled winner.
        """
        return replace(
            self,
            policy_chosen=self.policy_rejected,
            policy_rejected=self.policy_chosen,
            reference_chosen=self.reference_rejected,
            reference_rejected=self.reference_chosen,
            chosen_length=self.rejected_length,
            rejected_length=self.chosen_length,
            p_chosen=None if self.p_chosen is None else 1 - self.p_chosen,
        )


@dataclass(frozen=True)
class UnpairedScores:
    """Log-likelihoods of B single answers with a label.

    Attributes:
        policy, reference: (B,) log-likelihoods.
        desirable: (B,) bool, whether the answer is liked.
        length: (B,) completion tokens.
        weight: (B,) applied by the objective.
        kl: (B,) or None, log-ratios of mismatched answers (another prompt's answer to this prompt),
            for a KL baseline: only their weighted mean over the global batch may enter a loss.
    """

    policy: Float[Tensor, " B"]
    reference: Float[Tensor, " B"]
    desirable: Tensor
    length: Float[Tensor, " B"] | None = None
    weight: Float[Tensor, " B"] | None = None
    kl: Float[Tensor, " B"] | None = None

    def __post_init__(self) -> None:
        check_equal_shapes("UnpairedScores", **vars(self))

    @property
    def log_ratio(self) -> Float[Tensor, " B"]:
        return self.policy - self.reference


@dataclass(frozen=True)
class GroupScores:
    """Log-likelihoods of G groups of up to K answers.

    Attributes:
        policy, reference: (G, K) log-likelihoods.
        rank: (G, K) int, 0 = best, equal = tie, -1 = unranked, which is below all ranked ones.
        mask: (G, K) bool, False where a group has fewer than K answers; any finite numbers there.
        length: (G, K) completion tokens.
        weight: (G,) applied by the objective.
    """

    policy: Float[Tensor, "G K"]
    reference: Float[Tensor, "G K"]
    rank: Tensor
    mask: Tensor
    length: Float[Tensor, "G K"] | None = None
    weight: Float[Tensor, " G"] | None = None

    def __post_init__(self) -> None:
        shapes = {
            name: tuple(value.shape)
            for name in ("policy", "reference", "rank", "mask", "length")
            if (value := getattr(self, name)) is not None
        }
        if self.policy.ndim != 2 or len(set(shapes.values())) != 1:
            raise ValueError(f"GroupScores needs tensors of one shape, (G, K); got {shapes}.")
        if self.weight is not None and self.weight.shape != self.policy.shape[:1]:
            raise ValueError(
                "GroupScores needs one weight per group, (G,); got weight "
                f"{tuple(self.weight.shape)} for policy {tuple(self.policy.shape)}."
            )

    @property
    def log_ratio(self) -> Float[Tensor, "G K"]:
        return self.policy - self.reference
