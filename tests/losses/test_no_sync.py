"""No loss and no modifier makes the host wait for the device, forwards or backwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from alignkit.losses import DIVERGENCES, LOSSES, PREFERENCE_LOSSES, modifiers
from alignkit.losses.divergences import with_divergence
from tests.laws.loss_laws import answers
from tests.laws.test_loss_laws import example
from tests.losses.no_sync import NoSync


def test_the_mode_notices_what_it_is_for() -> None:
    x = torch.ones(3)
    for read in (
        lambda: x[0].item(),
        lambda: bool(x.sum() > 0),
        lambda: x[x > 0],
        lambda: x.nonzero(),
    ):
        with NoSync(), pytest.raises(AssertionError, match=r"host|depends"):
            read()
    with NoSync():
        torch.where(x > 0, x, 0.0).cumsum(0).sort()


def leaves(name: str) -> tuple[Any, list[torch.Tensor]]:
    """Scores of an example with every field; weights too."""
    scores = example(LOSSES[name])
    fields = [policy for policy, _ in answers(scores)]
    given = {field: getattr(scores, field).clone().requires_grad_() for field in fields}
    return replace(scores, **given, weight=torch.tensor([1.0, 2.0, 0.5])), list(given.values())


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_states(name) -> None:
    row = LOSSES[name]
    scores, leaf = leaves(name)
    with NoSync():
        state = row.next_state(scores, {}, beta=0.1)
        state = row.next_state(scores, state, beta=0.1)
        loss = (row(scores, beta=0.1, state=state) * scores.weight).sum()
        torch.autograd.grad(loss, leaf, allow_unused=True)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_and_modifiers(divergence) -> None:
    scores, leaf = leaves("sigmoid")
    with NoSync():
        given = with_divergence(scores, divergence)
        product = scores.chosen * scores.rejected
        factor = modifiers.safeguard_factor(scores.chosen**2, product)
        given = replace(given, policy_rejected=modifiers.damped(given.policy_rejected, factor))
        loss = PREFERENCE_LOSSES["sigmoid"](given, beta=0.1)
        loss = loss + 0.5 * modifiers.anchor_loss(scores)
        loss = loss * modifiers.wpo_weight(scores.chosen, scores.rejected)
        torch.autograd.grad(loss.sum(), leaf)
        modifiers.without_surplus(scores.chosen, scores.rejected, 0.5)
