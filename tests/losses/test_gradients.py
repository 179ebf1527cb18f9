"""Gradients of every row: against finite differences, and against forms derived by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.losses import LOSSES, PREFERENCE_LOSSES, PairLoss
from tests.builders import pair_scores
from tests.laws.loss_laws import answers
from tests.laws.test_loss_laws import example
from tests.losses.examples import batch3, one_pair, standard

GRID = (-30.0, -3.0, 0.0, 0.5, 3.0, 30.0)
DETACHED = {"beta_dpo"}
"""Rows with a detached statistic of their own input: what differences see, autograd must not."""


def assert_gradients(name: str, scores: Any, beta: float, **keywords: Any) -> None:
    row = LOSSES[name]
    state = row.next_state(scores, {}, beta=beta, **keywords)
    fields = [policy for policy, _ in answers(scores)]
    leaves = [getattr(scores, field).clone().requires_grad_() for field in fields]

    def losses(*values: Tensor) -> Tensor:
        given = replace(scores, **dict(zip(fields, values, strict=True)))
        return row(given, beta=beta, state=state, **keywords)

    torch.autograd.gradcheck(losses, leaves, eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - DETACHED))
def test_gradients_equal_central_differences(name) -> None:
    for beta in (0.1, 0.7):
        assert_gradients(name, example(LOSSES[name]), beta)
        assert_gradients(name, standard(name), beta)


UNCOUPLED = [n for n, row in PREFERENCE_LOSSES.items() if not row.coupled]


@pytest.mark.parametrize("name", UNCOUPLED)
def test_gradients_equal_central_differences_far_out(name) -> None:
    """On all pairs of the grid at once; DPO-positive has kinks at w = 0 and l = 0."""
    cells = [(w, ell) for w in GRID for ell in GRID if (w and ell) or name != "dpop"]
    w, ell = zip(*cells, strict=True)
    more = {"chosen_length": 5.0, "rejected_length": 8.0, "score_chosen": 3.0}
    scores = pair_scores(w, ell, **more, score_rejected=1.0, p_chosen=0.8)
    if name in ("orpo", "mapo"):  # log-likelihoods are negative
        scores = pair_scores([x - 31 for x in w], [x - 31 for x in ell], **more, score_rejected=1)
    assert_gradients(name, scores, 0.3)


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slopes(name: str, scores: Any, beta: float = 0.1, **keywords: Any) -> list[float]:
    fields = [policy for policy, _ in answers(scores)]
    leaves = [getattr(scores, field).clone().requires_grad_() for field in fields]
    given = replace(scores, **dict(zip(fields, leaves, strict=True)))
    loss = LOSSES[name](given, beta=beta, **keywords).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [0.0 if g is None else g.flatten().tolist() for g in found]


B, W, ELL, H = 0.1, 1.0, -0.5, 1.5
BY_HAND = {
    "sigmoid": (-B * s(-B * H), B * s(-B * H)),
    "hinge": (-B, B),
    "ipo": (2 * (1 / 5 + 0.5 / 8 - 5) / 5, -2 * (1 / 5 + 0.5 / 8 - 5) / 8),
    "robust": tuple(sign * B * (-0.9 * s(-B * H) - 0.1 * s(B * H)) / 0.8 for sign in (1, -1)),
    "exo_pair": tuple(
        # d/dx of s (ln s - ln(1-e)) + (1-s)(ln(1-s) - ln e) = s (1-s) (x - ln((1-e)/e)).
        sign * B * s(0.15) * s(-0.15) * (0.15 - math.log(0.999 / 0.001))
        for sign in (1, -1)
    ),
    "nca_pair": (-B * s(-B * W) + B * s(B * W) / 2, B * s(B * ELL) / 2),
    "bco_pair": (-B * s(-B * W), B * s(B * ELL)),
    "sppo_hard": (2 * (W - 5), 2 * (ELL + 5)),
    "sppo": (2 * (W - 5), 2 * (ELL + 5)),
    "apo_zero": (-B * s(B * W) * s(-B * W), B * s(B * ELL) * s(-B * ELL)),
    "apo_down": (
        B * s(B * W) * s(-B * W) - B * s(B * H) * s(-B * H),
        B * s(B * H) * s(-B * H),
    ),
    "cal_dpo": (-s(-H) + 2 * (W - 5), s(-H) + 2 * (ELL + 5)),
    "rdpo": (-B * s(-0.09), B * s(-0.09)),
    "odpo": (-B * s(0.35), B * s(0.35)),
    "dpop": (-B * s(-0.15), B * s(-0.15)),
    "sigmoid_norm": (-B / 5 * s(-0.02625), B / 8 * s(-0.02625)),
    "aot": (-B * s(-B * H), B * s(-B * H)),
    "aot_unpaired": (-B * s(-B * H), B * s(-B * H)),
    "beta_dpo": (-B * s(-B * H), B * s(-B * H)),
    # p_w - p_l = 2: log-likelihoods themselves, 10 nats over 5 tokens.
    "cpo": (-B * s(-0.2) - 1 / 5, B * s(-0.2)),
    "simpo": (-B / 5 * s(B), B / 8 * s(B)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_gradients_derived_by_hand(name) -> None:
    [chosen], [rejected] = slopes(name, one_pair(), B)
    assert (chosen, rejected) == pytest.approx(BY_HAND[name], rel=1e-9)


def test_the_dpo_gradient_of_the_paper() -> None:
    assert slopes("sigmoid", one_pair())[0][0] == pytest.approx(-0.0462570, abs=1e-7)
    assert slopes("sigmoid", one_pair(policy_chosen=-11.0, policy_rejected=-11.5)) == [
        [-0.05],
        [0.05],
    ]


def test_kto_and_bco_gradients_by_hand() -> None:
    [found] = slopes("kto", standard("kto"))
    chosen, rejected = B * (W - 0.3), B * (0.3 - ELL)
    wanted = [-B * s(chosen) * s(-chosen), B * s(rejected) * s(-rejected)]
    assert found == pytest.approx(wanted, rel=1e-9)
    [found] = slopes("bco", standard("bco"))
    shift = B * (W + ELL) / 2  # detached: the threshold passes no gradient on
    assert found == pytest.approx([-B * s(shift - B * W), B * s(B * ELL - shift)], rel=1e-9)


def test_plackett_luce_gradient_by_hand() -> None:
    """Choice by choice: the softmax over what is left, minus the one chosen."""
    [found] = slopes("plackett_luce", standard("plackett_luce"))
    e = [math.exp(x) for x in (0.1, -0.05, -0.2)]
    first, second = [x / sum(e) for x in e], [x / (e[1] + e[2]) for x in e]
    wanted = [first[0] - 1, first[1] + second[1] - 1, first[2] + second[2]]
    assert found == pytest.approx([B * x for x in wanted], rel=1e-9)


def test_beta_dpo_s_own_beta_passes_no_gradient_on() -> None:
    state = LOSSES["beta_dpo"].next_state(pair_scores([0.0, -4.0], [0.0, 0.0]), {}, beta=0.1)
    # M0 = -2, so that b' = 0.1 (1 + 0.6 (-2/3 + 2)) = 0.18.
    found = slopes("beta_dpo", batch3(), 0.1, rho=0.0, state=state)
    assert found[0] == pytest.approx([-0.18 * s(-0.18 * h) for h in (4, -1.5, -4.5)], rel=1e-9)


DOWNHILL = [n for n, row in PREFERENCE_LOSSES.items() if isinstance(row, PairLoss)]


@pytest.mark.parametrize("name", sorted(set(DOWNHILL) - {"apo_down"}))
def test_the_chosen_answer_gains_where_the_pair_has_not_got_its_margin(name) -> None:
    assert slopes(name, standard(name), 0.1)[0][0] < 0


def test_apo_down_lowers_the_chosen_answer_and_the_rejected_one_more() -> None:
    [chosen], [rejected] = slopes("apo_down", one_pair(policy_chosen=-11.0, policy_rejected=-11.5))
    assert chosen == pytest.approx(0) and rejected > 0
    [chosen], [rejected] = slopes(
        "apo_down", one_pair(policy_chosen=-5.0, policy_rejected=-20.0), 0.3
    )
    assert chosen > 0 and rejected > 0
