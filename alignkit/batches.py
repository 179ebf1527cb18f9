"""The vocabulary of data: a batch is N answers to G prompt groups.

Preference pairs are groups of 2, K-wise rankings groups of K, SFT and KTO rows groups of 1. One
shape serves them all, so that packing, sharding and randomness are written once.

Legend for shapes: N answers, G groups, B pairs, T tokens, V vocabulary, C/H/W latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor


class Content(Protocol):
    """The wing's own ragged data of one batch: all answers of group 0, then of group 1 ..."""

    def select(self, groups: Sequence[int], answers: Sequence[int]) -> Self:
        """The content of the given groups, whose answers have the given places among the N."""
        ...

    def recombine(self, groups: Sequence[int], answers: Sequence[int]) -> Self:
        """Groups of one: the prompt of `groups[i]` with the answer `answers[i]`, whosever it is."""
        ...

    def scored_lengths(self) -> list[int]:
        """What `Likelihood.length` will be of each answer, known without a model."""
        ...


@dataclass(frozen=True)
class Experience:
    """What was found out about N answers when the policy wrote them; on the CPU.

    Attributes:
        tokens: name -> (N, T), column t of the t-th token of an answer, right-padded. "mask" is
            True where there is one that counts.
        answers: name -> (N,), measured of whole answers; NaN is missing.
        phase: name -> a number of the rollout as a whole.
    """

    tokens: Mapping[str, Tensor]
    answers: Mapping[str, Tensor]
    phase: Mapping[str, float]

    def select(self, answers: Tensor) -> Experience:
        """That of the answers at the given places."""
        return replace(
            self,
            tokens={name: value[answers] for name, value in self.tokens.items()},
            answers={name: value[answers] for name, value in self.answers.items()},
        )


@dataclass(frozen=True)
class Batch:
    """N answers to G groups. Everything but `content` is small and stays on the CPU.

    Attributes:
        content: the wing's own data.
        group: (N,) int64, which group an answer belongs to; non-decreasing.
        rank: (N,) int64, 0 = best of its group, equal = tie, -1 = unranked.
        score: (N,) float32 or None, what a rater or a reward gave each answer (columns
            `score_chosen` and `score_rejected`, or `scores`); higher is better, NaN is none.
        position: (G,) int64, the group's place in the optimizer step's *global* batch. Every random
            draw of the step is keyed by it, never by process or micro-batch.
        row_id: (G,) int64, the row's identity in the data: the key of augmentation, and what error
            messages name.
        weight: (G,) float32 or None (all 1). 0 means "row absent", 2 "row twice".
        target_margin: (G,) float32 or None, subtracted from the preference logit after beta.
        p_chosen: (G,) float32 or None, the probability that the chosen answer is the better one.
        desirable: (G,) bool or None, the label of unpaired rows.
        mismatched: where the source was asked for it, G groups of one: this batch's prompts, each
            with the answer of another prompt of the global batch. Same positions, row ids and
            weights.
        rows: the G source rows, for rewards and reports; None where nobody asked for them.
        experience: of answers that the policy wrote itself, what was found out then.
    """

    content: Any
    group: Tensor
    rank: Tensor
    position: Tensor
    row_id: Tensor
    weight: Tensor | None = None
    target_margin: Tensor | None = None
    p_chosen: Tensor | None = None
    desirable: Tensor | None = None
    score: Tensor | None = None
    mismatched: Batch | None = None
    rows: tuple[Mapping[str, Any], ...] | None = None
    experience: Experience | None = None

    def __post_init__(self) -> None:
        num_groups = len(self.position)
        assert len(self.group) == len(self.rank), (self.group.shape, self.rank.shape)
        assert self.score is None or len(self.score) == len(self.rank), self.score.shape
        for name in ("row_id", "weight", "target_margin", "p_chosen", "desirable", "rows"):
            value = getattr(self, name)
            assert value is None or len(value) == num_groups, (name, len(value), num_groups)

    @property
    def num_groups(self) -> int:
        return len(self.position)

    @property
    def num_answers(self) -> int:
        return len(self.group)

    def weights(self) -> Tensor:
        """(G,) float32: the given weights, or ones."""
        return torch.ones(self.num_groups) if self.weight is None else self.weight

    def select(self, groups: Sequence[int]) -> Batch:
        """The sub-batch of the given groups (indices into 0..G-1), in the order given."""
        groups = list(groups)
        members: list[list[int]] = [[] for _ in range(self.num_groups)]
        for answer, group in enumerate(self.group.tolist()):
            members[group].append(answer)
        answers = [answer for group in groups for answer in members[group]]
        places = torch.tensor(answers, dtype=torch.int64)
        new_group = [new for new, group in enumerate(groups) for _ in members[group]]
        index = torch.tensor(groups, dtype=torch.int64)
        per_group: dict[str, Any] = {
            name: None if value is None else value[index]
            for name in _GROUP_TENSORS
            for value in [getattr(self, name)]
        }
        return Batch(
            content=self.content.select(groups, answers),
            group=torch.tensor(new_group, dtype=torch.int64),
            rank=self.rank[places],
            score=None if self.score is None else self.score[places],
            mismatched=None if self.mismatched is None else self.mismatched.select(groups),
            rows=None if self.rows is None else tuple(self.rows[g] for g in groups),
            experience=None if self.experience is None else self.experience.select(places),
            **per_group,
        )

    def absent(self) -> Batch:
        """The same batch with every weight 0: it occupies a process and adds nothing."""
        mismatched = None if self.mismatched is None else self.mismatched.absent()
        return replace(self, weight=torch.zeros(self.num_groups), mismatched=mismatched)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Where the chosen and the rejected answer of each group stand among the N answers.

        Returns two (G,) int64 CPU tensors. Every group must have exactly two answers.
        """
        sizes = torch.bincount(self.group, minlength=self.num_groups)
        if not bool((sizes == 2).all()):
            raise ValueError(
                "A pairwise loss needs groups of exactly two answers; got group sizes "
                f"{sorted(set(sizes.tolist()))}. Use a loss of GROUP_LOSSES for K-wise data."
            )
        first = torch.arange(self.num_groups) * 2
        swapped = (self.rank[first] > self.rank[first + 1]).long()
        return first + swapped, first + 1 - swapped


_GROUP_TENSORS = ("position", "row_id", "weight", "target_margin", "p_chosen", "desirable")


Metrics = dict[str, tuple[Tensor, Tensor]]
"""Name -> (sum, count), both scalars on the device; reduced over processes at logging time."""


@dataclass(frozen=True)
class Likelihood:
    """What a wing mints: one number per answer.

    Attributes:
        total: (N,) float32 log-likelihood. Text: sum of token log-probs of the completion, in nats.
            Images: minus half the mean squared denoising error at the shared draw.
        length: (N,) float32, completion tokens; 1 for images.
        extras: further tensors that an objective asked for, by name. Both wings: none in common.
            Text: "token_logps", "token_mask"; "public", (N,) log-likelihood of the first k tokens
            of each answer, k the length of the shortest answer of its group; "alignment", (N,) mean
            over an answer's tokens of ln p(token) - ln sum_v p(v)^2, detached; "correct", (N,) how
            many of its scored tokens are the likeliest at their place; "entropy", (N, T) of the
            next token; "values", (N, T) of the state before each token. Images: "error",
            "timestep";
            "overlap", (N,) mean over elements of an image's residual times that of the best-ranked
            image of its group, detached.
        work: what computing it took, as metrics: name -> (sum, count), numbers of the host. Text:
            "positions/per_token", positions computed over tokens of prompts and answers;
            "positions/of_padded", over those of one padded rectangle.
    """

    total: Tensor
    length: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    work: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.total.shape == self.length.shape and self.total.ndim == 1, (
            self.total.shape,
            self.length.shape,
        )

    def spent(self) -> Metrics:
        """`work` on the device, written there by the device itself."""

        def put(value: float) -> Tensor:
            return self.total.new_full((), value, dtype=torch.float64)

        return {name: (put(value), put(count)) for name, (value, count) in self.work.items()}


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. Everything was measured *before* that step's update.

    Attributes:
        step: 1 for the first step.
        loss: mean loss over the global batch.
        grad_norm: Euclidean norm of the global gradient before clipping.
        learning_rate: the rate that this step's update used.
        metrics: means since the last logged step; empty on steps that are not logged.
        seconds: wall time of the step.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """Flat form, as in `history` and metrics.jsonl."""
        flat = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "metrics"}
        return {**flat, **self.metrics}
