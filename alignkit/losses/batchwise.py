"""Pairwise losses that couple the pairs of the global batch. Symbols as in preference.py.

All batch statistics are weighted: weight 0 is "row absent", weight 2 "row twice".
"""

from __future__ import annotations

import math
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from alignkit.losses.defaults import betas
from alignkit.losses.ranges import within
from alignkit.losses.running import running, running_mean
from alignkit.losses.scores import PairScores, needed
from alignkit.losses.table import Golden, PairLoss, State


def _coupled(x: Tensor, y: Tensor, weight: Tensor | None) -> Float[Tensor, " B"]:
    """Mean of L(x_i - y_j) over what optimal transport in one dimension couples x_i with: equal
    quantiles of the two weighted samples.

    Without weights each sorted x meets the y of the same rank. With weights, row i owns an interval
    of length weight_i of the quantile axis on both sides; the pieces between all interval ends are
    the coupling.
    """
    # Stable: equal values keep the order of the batch.
    x_order, y_order = x.detach().argsort(stable=True), y.detach().argsort(stable=True)
    if weight is None:
        losses = softplus(y[y_order] - x[x_order])
        return torch.zeros_like(losses).index_copy(0, x_order, losses)
    v = weight.double()
    x_ends, y_ends = v[x_order].cumsum(0), v[y_order].cumsum(0)
    ends = torch.cat([x_ends, y_ends]).sort().values
    pieces = ends.diff(prepend=ends.new_zeros(1))
    middle, last = ends - pieces / 2, len(x) - 1
    i = x_order[torch.searchsorted(x_ends, middle).clamp(max=last)]
    j = y_order[torch.searchsorted(y_ends, middle).clamp(max=last)]
    share = (pieces / v[i].clamp(min=1e-300)).to(x.dtype)
    return torch.zeros_like(x).index_add(0, i, share * softplus(y[j] - x[i]))


def aot(scores: PairScores, *, beta: float) -> Float[Tensor, " B"]:
    """AOT, paired: mean over ranks k of L(b [(p_w - p_l)_(k) - (r_w - r_l)_(k)]), both sorted.

    Melnyk et al. 2024 (2406.05882): the policy's margins shall dominate the reference's as
    a distribution (first order), not pair by pair. One pair alone is DPO.

    Args:
        scores: the B pairs of the global batch.
        beta: strength of the KL to the reference.

    Returns:
        (B,) losses, each at the pair whose policy margin it moves.
    """
    policy = beta * (scores.policy_chosen - scores.policy_rejected)
    reference = beta * (scores.reference_chosen - scores.reference_rejected)
    return _coupled(policy, reference, scores.weight)


def aot_unpaired(scores: PairScores, *, beta: float) -> Float[Tensor, " B"]:
    """AOT, unpaired: mean over ranks k of L(b [w_(k) - l_(k)]), both sorted.

    Melnyk et al. 2024 (2406.05882): the log-ratios of chosen answers shall dominate those of
    rejected ones as a distribution; which answers share a prompt plays no part.

    Args:
        scores: the B pairs of the global batch.
        beta: strength of the KL to the reference.

    Returns:
        (B,) losses, each at the pair whose chosen answer it moves.
    """
    return _coupled(beta * scores.chosen, beta * scores.rejected, scores.weight)


def beta_dpo(
    scores: PairScores,
    *,
    beta: float,
    state: State,
    a: float = 0.6,
    rho: float = 0.2,
    momentum: float = 0.9,
) -> Float[Tensor, " B"]:
    """beta-DPO: L(b' h - m) on the kept pairs, b' = max(1e-3, b [1 + a (mean of kept h - M0)]).

    Wu et al. 2024 (2407.08639). M0 and S are running means of the batch's mean and
    standard deviation of h. A share 1 - rho of the pairs is kept, drawn without replacement with
    weights exp(-((h - M0) / S)^2 / 2); the losses of the others are 0, and those of the kept ones
    are scaled up so that the batch mean is theirs. b' is detached.

    Args:
        scores: the B pairs of the global batch; with `uniform` when rho > 0.
        beta: strength of the KL at a batch of usual margin.
        state: of `beta_dpo_state`.
        a: how far a batch's margin moves beta, per nat.
        rho: share of pairs that is left out, in [0, 1).
        momentum: of M0 and S.

    Returns:
        (B,) losses.

    Raises:
        ConfigError: for rho or momentum outside [0, 1).
        ValueError: if rho > 0 and `uniform` is missing.
    """
    within("[0, 1)", "beta_dpo", rho=rho, momentum=momentum)
    gap = scores.margin.detach()
    mean, std = running(state, "mean"), running(state, "std")
    weight = torch.ones_like(gap) if scores.weight is None else scores.weight.to(gap)
    if rho > 0:
        (uniform,) = needed(scores, "uniform", by=f"beta_dpo(rho={rho})")
        kept = _drawn(-0.5 * ((gap - mean) / std.clamp(min=1e-12)) ** 2, uniform, 1 - rho)
        weight = torch.where(kept, weight, 0.0)
    kept_weight = weight.sum()
    effective = (beta * (1 + a * ((weight * gap).sum() / kept_weight - mean))).clamp(min=1e-3)
    loss = softplus(-scores.offset(effective * scores.margin))
    if scores.p_chosen is not None:
        swapped = softplus(-scores.offset(-effective * scores.margin))
        loss = scores.p_chosen * loss + (1 - scores.p_chosen) * swapped
    if rho == 0:
        return loss
    total = len(gap) if scores.weight is None else scores.weight.sum()
    return torch.where(kept, loss * (total / kept_weight), 0.0)


def _drawn(log_weight: Tensor, uniform: Tensor, share: float) -> Tensor:
    """(B,) bool: a draw without replacement of `share` of the rows, by the exponential races of
    Efraimidis and Spirakis 2006: row i is the first with probability weight_i / sum of weights.
    """
    arrival = torch.log(-torch.log1p(-uniform.to(log_weight)).clamp(max=-1e-30)) - log_weight
    number = max(1, round(share * len(uniform)))
    first = arrival.topk(number, largest=False).indices
    return torch.zeros_like(uniform, dtype=torch.bool).index_fill(0, first, True)


def beta_dpo_state(
    scores: PairScores,
    state: State,
    *,
    beta: float,
    a: float = 0.6,
    rho: float = 0.2,
    momentum: float = 0.9,
) -> dict[str, Tensor]:
    """Running mean and standard deviation of the margins, this batch included."""
    gap = scores.margin.detach().double()
    weight = torch.ones_like(gap) if scores.weight is None else scores.weight.to(gap)
    total = weight.sum()
    mean = (weight * gap).sum() / total
    # The sample's deviation, n - 1 below, as in the authors' code; 0 for a single pair.
    std = ((weight * (gap - mean) ** 2).sum() / (total - 1).clamp(min=1)).sqrt()
    return {
        **running_mean(state, "mean", mean, momentum),
        **running_mean(state, "std", std, momentum),
    }


_SORTED = {
    "p_chosen": "margins meet by rank, and a pair of two opposite labels has two ranks",
    "target_margin": "margins meet by rank, and the offset of one pair has no partner there",
}

ROWS = (
    PairLoss(
        name="aot",
        function=aot,
        paper="Melnyk et al. 2024, Distributional Preference Alignment, arXiv:2406.05882",
        equation="mean over ranks k of L(b [(p_w - p_l)_(k) - (r_w - r_l)_(k)]), each sorted",
        betas=betas(source="as in TRL"),
        laws=frozenset({"step0", "shift", "scaling", "weight"}),
        golden=Golden(0.1, 0.6209570),
        minimiser="the policy's margins exceed the reference's at every quantile (diverges)",
        at_reference=lambda beta: math.log(2),
        coupled=True,
        refuses=MappingProxyType(_SORTED),
        no_divergence="it compares margins of log-likelihoods, and has no ratio per answer",
    ),
    PairLoss(
        name="aot_unpaired",
        function=aot_unpaired,
        paper="Melnyk et al. 2024, Distributional Preference Alignment, arXiv:2406.05882",
        equation="mean over ranks k of L(b [w_(k) - l_(k)]), each sorted",
        betas=betas(source="as in TRL"),
        laws=frozenset({"step0", "ratio", "scaling", "weight"}),
        golden=Golden(0.1, 0.6209570),
        minimiser="the chosen log-ratios exceed the rejected ones at every quantile (diverges)",
        at_reference=lambda beta: math.log(2),
        coupled=True,
        refuses=MappingProxyType(_SORTED),
    ),
    PairLoss(
        name="beta_dpo",
        function=beta_dpo,
        paper="Wu et al. 2024, beta-DPO: Dynamic beta, arXiv:2407.08639",
        equation="L(b' h - m) on kept pairs, b' = max(1e-3, b (1 + a (mean of kept h - M0)))",
        betas=betas(source="Wu et al. 2024", scale_free=False),
        laws=frozenset({"step0", "shift", "ratio", "p_chosen"}),
        golden=Golden(0.1, 0.6209570),
        minimiser="h* = logit(p)/b'",
        at_reference=lambda beta: math.log(2),
        coupled=True,
        scale_free=False,
        needs=("uniform",),
        update=beta_dpo_state,
        mixes=False,
    ),
)
