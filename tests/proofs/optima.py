"""Whole-policy optima in float64 numpy: by closed form, and by minimising the population loss.

A prompt has answers with reference probabilities `mu` and rewards `r`; answer i beats j with
probability s(r_i - r_j). The data are all ordered pairs, i = j among them, with weights mu_i mu_j.
Nothing here comes from the code under test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import brentq, minimize
from scipy.special import expit, logsumexp

Vector = np.ndarray
Optimum = Callable[[Vector, Vector], Vector]
"""(mu, r) -> the policy's probabilities."""
Formula = Callable[[Vector, Vector], Vector]
"""(w, l), each (A, A) over chosen and rejected answers -> the losses of these pairs."""


def beats(r: Vector) -> Vector:
    """(A, A) Bradley-Terry: the probability that the row's answer beats the column's."""
    return expit(r[:, None] - r[None, :])


def wins(mu: Vector, r: Vector) -> Vector:
    """(A,) the probability that an answer beats one of the reference's, a tie counting one half."""
    return beats(r) @ mu


def plackett_luce(r: Vector, order: Sequence[int]) -> float:
    """The probability of an order, best first: choices from what is left, in proportion to e^r."""
    return float(
        np.prod([np.exp(r[i] - logsumexp(r[list(order[k:])])) for k, i in enumerate(order)])
    )


def tilted(mu: Vector, scores: Vector) -> Vector:
    """mu exp(scores), normalised."""
    logits = np.log(mu) + scores
    return np.exp(logits - logsumexp(logits))


def per_token(base: Vector, lengths: Vector, scores: Vector) -> Vector:
    """base exp(length (scores + c)), with c such that it sums to 1."""

    def excess(c: float) -> float:
        return float((base * np.exp(lengths * (scores + c))).sum() - 1)

    return base * np.exp(lengths * (scores + brentq(excess, -50, 50, xtol=1e-14)))


def of_divergence(inverse: Callable[[Vector], Vector], limit: float, beta: float) -> Optimum:
    """argmax E[r] - beta E_mu[f(u)], u = policy / mu: u = inverse((r - lam) / beta), with lam such
    that the policy sums to 1 (Wang et al. 2023, 2309.16240, theorem 1).

    Args:
        inverse: of f'.
        limit: where `inverse` goes to infinity.
        beta: strength of the divergence.
    """

    def optimum(mu: Vector, r: Vector) -> Vector:
        def excess(lam: float) -> float:
            return float((mu * inverse((r - lam) / beta)).sum() - 1)

        lowest = r.max() - limit * beta
        return mu * inverse((r - brentq(excess, lowest + 1e-9, lowest + 100, xtol=1e-14)) / beta)

    return optimum


def minimised(
    loss: Formula, mu: Vector, r: Vector, *, flipped: float = 0.0, reference: bool = True
) -> Vector:
    """The policy at the minimum of the population loss, found by a search from mu.

    Args:
        loss: of a pair.
        mu, r: reference and rewards.
        flipped: share of the labels that are wrong.
        reference: False gives the loss log-likelihoods for log-ratios.
    """
    weight = np.outer(mu, mu) * (flipped + (1 - 2 * flipped) * beats(r))

    def population(logits: Vector) -> float:
        ratio = logits - logsumexp(logits) - (np.log(mu) if reference else 0)
        w, ell = np.broadcast_arrays(ratio[:, None], ratio[None, :])
        return float((weight * loss(w, ell)).sum())

    found = minimize(population, np.log(mu), options={"gtol": 1e-10, "maxiter": 10_000}).x
    return np.exp(found - logsumexp(found))
