"""The one place where policy and reference meet on the same draw.

For text the log-likelihood is deterministic. For diffusion it is a Monte-Carlo estimate, and a
difference of two estimates on different draws is noise: so the draw is made here, once, and both
models see it.
"""

from __future__ import annotations

import torch

from alignkit.batches import Batch, Likelihood
from alignkit.protocols import Backend, Key, Reference

NOTHING: frozenset[str] = frozenset()


def log_likelihoods(
    backend: Backend,
    reference: Reference,
    batch: Batch,
    key: Key,
    *,
    want: frozenset[str] = NOTHING,
    want_of_reference: frozenset[str] = NOTHING,
    known: Likelihood | None = None,
) -> tuple[Likelihood, Likelihood]:
    """Likelihoods of the N answers under policy (with graph) and reference (without), on one draw.

    Args:
        backend: evaluates the policy.
        reference: evaluates the comparison.
        batch: one micro-batch, in the same layout for both.
        key: (seed, optimizer step).
        want, want_of_reference: extras asked of each.
        known: the reference's likelihoods of this batch on this key, where an earlier pass found
            them.
    """
    draw = backend.draw(batch, key)
    of_reference = known
    if of_reference is None:
        # The reference goes first: an adapter that it switches off is on again before the policy's
        # forward, and therefore while checkpointing recomputes in backward.
        with torch.no_grad():
            of_reference = reference.log_likelihood(batch, draw, want_of_reference)
    of_policy = backend.module(batch, draw, want)
    return of_policy, of_reference
