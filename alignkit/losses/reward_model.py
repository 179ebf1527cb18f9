"""Losses of reward models: pure functions of the scores that a model gives answers.

Symbols: r = score of an answer, d = r_chosen - r_rejected, m = `target_margin`, L(x) = -log s(x)
= softplus(-x), e = label smoothing, c = centring. A score is a log-ratio whose reference is 0, and
the losses of comparisons are those of `preference` and `group` at beta 1; what is their own is the
centring, since d says nothing of where scores lie:

    + c (r_chosen + r_rejected)^2      Eisenstein et al. 2023 (2312.09244), c = 0.01 there
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, huber_loss

from alignkit.losses import group, preference
from alignkit.losses.ranges import within
from alignkit.losses.scores import GroupScores, PairScores, check_equal_shapes
from alignkit.losses.table import Beta, GroupLoss, Loss, PairLoss


@dataclass(frozen=True)
class RatedScores:
    """Scores of N answers that were rated one by one.

    Attributes:
        policy: (N,) the model's scores.
        rating: (N,) what raters gave.
        logits: (N, K - 1), of "rated above k", where the head is ordinal.
        values, mask: (N, T) scores of the states before each token, and which of them there are,
            where a loss wants them.
        weight: (N,) applied by the objective.
    """

    policy: Float[Tensor, " N"]
    rating: Float[Tensor, " N"]
    logits: Tensor | None = None
    values: Tensor | None = None
    mask: Tensor | None = None
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        check_equal_shapes("RatedScores", policy=self.policy, rating=self.rating)


def bradley_terry(
    scores: PairScores, *, beta: float, label_smoothing: float = 0.0, centering: float = 0.0
) -> Float[Tensor, " B"]:
    """Bradley-Terry: (1 - e) L(d - m) + e L(-d - m) + c (r_chosen + r_rejected)^2.

    Christiano et al. 2017 (1706.03741) Eq. 1; the margin is that of Touvron et al. 2023
    (2307.09288) Eq. 2, inside the sigmoid and without gradient. d loss / d r_chosen = -s(-(d - m))
    at e = c = 0.

    Args:
        scores: B pairs, with scores in the policy's place and zeros in the reference's.
        beta: of d; 1.
        label_smoothing: e in [0, 0.5], for labels flipped with probability e.
        centering: c of at least 0.

    Returns:
        (B,) losses.

    Raises:
        ConfigError: for e or c outside of their ranges.
    """
    loss = preference.sigmoid(scores, beta=beta, label_smoothing=label_smoothing)
    within("[0, inf)", "bradley_terry", centering=centering)
    if centering == 0:
        return loss
    return loss + centering * (scores.chosen + scores.rejected) ** 2


def k_choose_2(
    scores: GroupScores, *, beta: float, label_smoothing: float = 0.0, centering: float = 0.0
) -> Float[Tensor, " G"]:
    """All pairs of K answers: mean over i ranked above j of Bradley-Terry's loss of i and j.

    Ouyang et al. 2022 (2203.02155) Eq. 1. Each answer is scored once, and every prompt weighs the
    same whatever its K. Tied pairs are left out. Since L(-d) = L(d) + d, smoothing adds e times the
    mean difference.

    Args:
        scores: G groups of up to K answers, with zeros in the reference's place.
        beta, label_smoothing, centering: as of `bradley_terry`.

    Returns:
        (G,) losses; 0 for a group without any decided pair.
    """
    within("[0, 0.5]", "bradley_terry", label_smoothing=label_smoothing)
    within("[0, inf)", "bradley_terry", centering=centering)
    loss = group.all_pairs(scores, beta=beta)
    if label_smoothing == 0 and centering == 0:
        return loss
    r = beta * scores.log_ratio
    difference = r[:, :, None] - r[:, None, :]
    total = scores.log_ratio[:, :, None] + scores.log_ratio[:, None, :]
    terms = label_smoothing * difference + centering * total**2
    decided = group.decided_pairs(scores)
    terms = torch.where(decided, terms, 0.0)
    return loss + terms.sum((1, 2)) / decided.sum((1, 2)).clamp(min=1)


def regression(
    scores: RatedScores, *, beta: float, scale: float = 1.0, huber: float = 0.0
) -> Float[Tensor, " N"]:
    """Regression: ((r - rating) / scale)^2, or Huber's loss of that; per token its mean.

    Of a value network (Ziegler et al. 2019, 1909.08593): where `values` are given, every state of
    the answer predicts its rating, the last one among them.

    Args:
        scores: N rated answers.
        beta: of no meaning; 1.
        scale: the spread of the ratings.
        huber: where the square becomes a line, in units of `scale`; 0 is nowhere.

    Returns:
        (N,) losses; 0 where the score is the rating.
    """
    within("(0, inf)", "regression", scale=scale)
    within("[0, inf)", "regression", huber=huber)

    def error(values: Tensor, ratings: Tensor) -> Tensor:
        off = (values - ratings) / scale
        if huber == 0:
            return off**2
        return 2 * huber_loss(off, torch.zeros_like(off), reduction="none", delta=huber)

    last = error(scores.policy, scores.rating)
    if scores.values is None or scores.mask is None:
        return last
    mask = scores.mask.to(last.dtype)
    before = (error(scores.values, scores.rating[:, None]) * mask).sum(-1)
    return (last + before) / (1 + mask.sum(-1))


def ordinal(scores: RatedScores, *, beta: float) -> Float[Tensor, " N"]:
    """Ordinal: mean over k of BCE(logit_k, rating > k), for ratings 0 .. K - 1.

    Frank & Hall 2001: one classifier per threshold; the expected rating is the sum over k of
    P(rating > k).

    Args:
        scores: N rated answers with K - 1 logits each.
        beta: of no meaning; 1.

    Returns:
        (N,) losses; ln 2 where all logits are 0.
    """
    assert scores.logits is not None, "an ordinal loss of a head without thresholds"
    thresholds = torch.arange(scores.logits.shape[1], device=scores.logits.device)
    above = (scores.rating[:, None] > thresholds).to(scores.logits.dtype)
    return binary_cross_entropy_with_logits(scores.logits, above, reduction="none").mean(-1)


class RatedLoss(Loss):
    """A loss of `RatedScores`, one value per answer."""

    def probe(self) -> RatedScores:
        zero = torch.zeros(1)
        return RatedScores(zero, zero, logits=torch.zeros(1, 2))


@dataclass(frozen=True)
class RewardLoss:
    """What a reward model is trained on, by the kind of its rows.

    Attributes:
        name: the name users write.
        rows: kind of rows -> the loss of such rows.
        kinds: of reward models that it trains.
        golden: its value on the table's example: a ranking of scores 2, 1, 0, -1; of ratings the
            score 0.7 with logits 0.4 and -1.1 for a rating of 1.
        wants: extras of the module's forward that it takes beside scores.
    """

    name: str
    rows: Mapping[str, Loss]
    kinds: tuple[str, ...]
    golden: float
    wants: frozenset[str] = field(default=frozenset())

    @property
    def first(self) -> Loss:
        """What stands for all of them in listings: that of the widest rows."""
        return list(self.rows.values())[-1]

    @property
    def paper(self) -> str:
        return self.first.paper

    @property
    def equation(self) -> str:
        return self.first.equation

    @property
    def keywords(self) -> Mapping[str, Any]:
        """None beside those of the method, which all of its losses share."""
        return {}


_BETAS = {"text": Beta(1.0, "a score is a logit")}
_SCORES: dict[str, Any] = {
    "betas": _BETAS,
    "laws": frozenset(),
    "at_reference": None,
    "needs_reference": False,
    "modalities": ("text",),
    "no_divergence": "scores have no reference",
}
_BT = (
    "Christiano et al. 2017, arXiv:1706.03741, Eq. 1; margin: Touvron et al. 2023, arXiv:2307.09288"
)

PAIRS = PairLoss(
    name="bradley_terry",
    function=bradley_terry,
    paper=_BT,
    equation="(1-e) L(d - m) + e L(-d - m) + c (r_w + r_l)^2",
    minimiser="d* = logit(p) at m = c = e = 0",
    **_SCORES,
)
_RANKINGS = (
    GroupLoss(
        name="bradley_terry",
        function=k_choose_2,
        paper="Ouyang et al. 2022, InstructGPT, arXiv:2203.02155, Eq. 1",
        equation="mean over i ranked above j of (1-e) L(r_i - r_j) + e L(r_j - r_i)",
        minimiser="differences of r = differences of Bradley-Terry utilities",
        **_SCORES,
    ),
    *(
        GroupLoss(
            name=row.name,
            function=row.function,
            paper=row.paper,
            equation=equation,
            minimiser=row.minimiser,
            **_SCORES,
        )
        for row, equation in (
            (group.GROUP_LOSSES["plackett_luce"], "sum over k < K of lse(r_k .. r_K) - r_k"),
            (group.GROUP_LOSSES["best_of_k"], "lse(r_1 .. r_K) - r_best"),
        )
    ),
)
REGRESSION = RatedLoss(
    name="regression",
    function=regression,
    paper="Ziegler et al. 2019, arXiv:1909.08593; Wang et al. 2023, HelpSteer, arXiv:2311.09528",
    equation="((r - rating) / scale)^2",
    minimiser="r* = mean rating",
    **_SCORES,
)
ORDINAL = RatedLoss(
    name="ordinal",
    function=ordinal,
    paper="Frank & Hall 2001, A Simple Approach to Ordinal Classification",
    equation="mean over k of BCE(logit_k, rating > k)",
    minimiser="logit_k* = logit(P(rating > k))",
    **_SCORES,
)

ROWS = (
    *(
        # Of two answers all three are the same loss.
        RewardLoss(
            row.name,
            MappingProxyType({"pairs": PAIRS, "groups": row}),
            ("classifier", "pairwise") if row.name == "bradley_terry" else ("classifier",),
            golden,
        )
        for row, golden in zip(_RANKINGS, (0.2070381, 1.1610574, 0.4401897), strict=True)
    ),
    RewardLoss("regression", MappingProxyType({"rated": REGRESSION}), ("regression",), 0.09),
    RewardLoss(
        "ordinal",
        MappingProxyType({"rated": ORDINAL}),
        ("regression",),
        0.4001753,
        frozenset({"logits"}),
    ),
)

REWARD_LOSSES: Mapping[str, RewardLoss] = MappingProxyType({row.name: row for row in ROWS})
"""Name -> loss of reward models."""
