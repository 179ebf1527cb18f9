"""Where the expected loss of one pair is smallest, by minimising it and by solving for it.

One answer beats the other with probability p; the loss is p f(scores) + (1 - p) f(swapped scores),
which is what `p_chosen` = p asks of a row.
"""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import pytest
import torch
from scipy.optimize import brentq, minimize, minimize_scalar

from alignkit.losses import GROUP_LOSSES, LOSSES, PREFERENCE_LOSSES, UNPAIRED_LOSSES
from tests.builders import pair_scores
from tests.ledger import Ledger
from tests.losses.examples import answers, group


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def noisy_margin_optimum(p: float, m: float) -> float:
    """d* = ln[(M(2p-1) + sqrt(M^2 (2p-1)^2 + 4p(1-p))) / (2(1-p))] with M = e^m."""
    big = math.exp(m) * (2 * p - 1)
    return math.log((big + math.sqrt(big**2 + 4 * p * (1 - p))) / (2 * (1 - p)))


CAL = brentq(lambda h: 1 / (1 + math.exp(-h)) - 0.8 + h - 0.6 / 0.5, -9, 9)
LENGTHS = {"chosen_length": 5.0, "rejected_length": 8.0}

# name, keywords, p, beta, further fields, h* (p = 0.8, beta = 0.5 unless something else is shown)
MARGINS: list[tuple[str, dict[str, Any], float, float, dict[str, float], float]] = [
    ("sigmoid", {}, 0.8, 0.5, {}, 2.7725887),
    ("sigmoid", {"label_smoothing": 0.1}, 0.8, 0.5, {}, 2.0919370),
    # Labels flipped with probability 0.1: 0.9 * 0.8 + 0.1 * 0.2 = 0.74.
    ("robust", {"label_smoothing": 0.1}, 0.74, 0.5, {}, 2.7725887),
    ("ipo", {"average": False}, 0.8, 0.5, {}, 0.6),
    ("ipo", {"average": False}, 1.0, 0.5, {}, 1.0),
    ("ipo", {}, 0.8, 0.5, {"chosen_length": 4.0, "rejected_length": 4.0}, 2.4),
    ("hinge", {}, 0.8, 0.5, {}, 2.0),
    ("hinge", {}, 0.6, 0.5, {}, 2.0),
    ("exo_pair", {}, 0.8, 0.5, {}, 8.2881060),
    ("sigmoid_norm", {}, 0.8, 0.5, {"chosen_length": 4.0, "rejected_length": 4.0}, 11.0903549),
    ("rdpo", {}, 0.8, 0.5, LENGTHS, 2.7725887 + 0.02 * 3 / 0.5),
    ("odpo", {}, 0.8, 1.0, {"score_chosen": math.e, "score_rejected": 0.0}, 2.1539621),
    ("dpop", {}, 0.8, 0.5, {}, 2.7725887),
    ("sppo_hard", {}, 0.8, 0.5, {}, 1.2),
    ("sppo", {}, 0.8, 0.5, {}, 1.2),
    ("cal_dpo", {}, 0.8, 0.5, {}, CAL),
    ("bco_pair", {}, 0.8, 0.5, {}, 2 * logit(0.8) / 0.5),
    ("nca_pair", {}, 0.8, 0.5, {}, (math.log(1.6) - math.log(0.4)) / 0.5),
    ("beta_dpo", {"rho": 0.0}, 0.8, 0.5, {}, 2.7725887),
    ("sigmoid", {}, 0.8, 1.0, {"target_margin": 1 / 3}, 1.6071666),
    ("sigmoid", {}, 0.8, 1.0, {"target_margin": 1.0}, 2.1539621),
    ("sigmoid", {}, 0.8, 1.0, {"target_margin": 3.0}, 4.0997121),
    ("sigmoid", {}, 0.6, 1.0, {"target_margin": 1.0}, 0.7324731),
    # Without a reference h is the difference of log-likelihoods, here per token: 2 * 0.5 = 1.
    ("simpo", {}, 0.8, 2.0, {"chosen_length": 1.0, "rejected_length": 1.0}, 2.1539621 / 2),
    ("cpo", {"cpo_alpha": 0.0}, 0.8, 0.5, LENGTHS, 2.7725887),
]


@pytest.mark.parametrize(("name", "keywords", "p", "beta", "fields", "golden"), MARGINS)
def test_margin_at_the_minimum(name, keywords, p, beta, fields, golden, ledger: Ledger) -> None:
    """The margin w - l of the minimum over w and l = c - w, c as the loss has it."""
    anchored = {"dpop": 40.0, "bco_pair": 0.0, "nca_pair": (math.log(1.6) + math.log(0.4)) / 0.5}
    level = anchored.get(name, 0.0)

    def population(h: float) -> float:
        w, ell = (level + h) / 2, (level - h) / 2
        return PREFERENCE_LOSSES[name](
            pair_scores(w, ell, p_chosen=p, **fields), beta=beta, **keywords
        ).item()

    found = minimize_scalar(population, bounds=(-30, 30), method="bounded", options={"xatol": 1e-9})
    given = ", ".join(f"{k}={v:g}" for k, v in {"p": p, "beta": beta, **keywords, **fields}.items())
    ledger.check(name, f"margin at {given}", got=found.x, expected=golden, tolerance=1e-4)


def test_margin_goldens_are_those_of_the_closed_form() -> None:
    for p, m, golden in ((0.8, 1 / 3, 1.6071666), (0.8, 3, 4.0997121), (0.6, 1, 0.7324731)):
        assert noisy_margin_optimum(p, m) == pytest.approx(golden, abs=1e-6)


LEVELS = {
    "nca_pair": (math.log(1.6) / 0.5, math.log(0.4) / 0.5),
    "bco_pair": (logit(0.8) / 0.5, -logit(0.8) / 0.5),
    "sppo_hard": (0.6, -0.6),
    "sppo": (0.6, -0.6),
    "cal_dpo": (CAL / 2, -CAL / 2),
}


@pytest.mark.parametrize("name", LEVELS)
def test_pointwise_losses_fix_both_log_ratios(name, ledger: Ledger) -> None:
    def population(x: Any) -> float:
        return PREFERENCE_LOSSES[name](pair_scores(x[0], x[1], p_chosen=0.8), beta=0.5).item()

    found = minimize(
        population, [0.3, -0.2], method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-14}
    )
    claim = "both log-ratios at p=0.8, beta=0.5"
    ledger.check(name, claim, got=found.x, expected=LEVELS[name], tolerance=1e-4)


def test_nca_s_score_is_the_log_of_twice_the_win_probability() -> None:
    assert 0.5 * LEVELS["nca_pair"][0] == pytest.approx(0.4700036, abs=1e-7)


UNPAIRED = {"nca": math.log(1.6), "bco": 0.3 + logit(0.8)}


@pytest.mark.parametrize("name", UNPAIRED)
def test_single_answers_liked_with_probability_p(name, ledger: Ledger) -> None:
    row = UNPAIRED_LOSSES[name]
    state = {"reward.sum": torch.full((2,), 0.3), "reward.mass": torch.ones(2)}

    def population(r: float) -> float:
        scores = answers([r, r], [True, False])
        liked, disliked = row(scores, beta=0.5, **({"state": state} if row.update else {})).tolist()
        return 0.8 * liked + 0.2 * disliked

    found = minimize_scalar(population, bounds=(-20, 20), method="bounded", options={"xatol": 1e-9})
    claim = "reward of an answer liked with probability 0.8"
    ledger.check(name, claim, got=0.5 * found.x, expected=UNPAIRED[name], tolerance=1e-4)


UTILITIES = [1.0, 0.2, -0.5]


def plackett_luce(order: tuple[int, ...]) -> float:
    """P(order) of a sequence of choices in proportion to e^utility."""
    e, chance = [math.exp(u) for u in UTILITIES], 1.0
    for k, i in enumerate(order):
        chance *= e[i] / sum(e[j] for j in order[k:])
    return chance


@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_rankings_recover_the_utilities_they_were_drawn_from(name, ledger: Ledger) -> None:
    chances = {order: plackett_luce(order) for order in permutations(range(3))}
    ranks = {order: [order.index(i) for i in range(3)] for order in chances}

    def population(x: Any) -> float:
        ratios = [x[0], x[1], -x[0] - x[1]]
        losses = {o: GROUP_LOSSES[name](group(ratios, ranks[o]), beta=0.5).item() for o in chances}
        return sum(chances[order] * loss for order, loss in losses.items())

    found = minimize(
        population, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-14}
    )
    mean = sum(UTILITIES) / 3
    expected = [utility - mean for utility in UTILITIES[:2]]
    claim = "the utilities that all rankings of three come from"
    ledger.check(name, claim, got=0.5 * found.x, expected=expected, tolerance=1e-4)


def test_certain_labels_drive_dpo_away_and_hold_ipo_and_nca() -> None:
    def slope(name: str, w: float, ell: float, **keywords: Any) -> tuple[float, float]:
        scores = pair_scores(w, ell)
        scores.policy_chosen.requires_grad_()
        scores.policy_rejected.requires_grad_()
        PREFERENCE_LOSSES[name](scores, beta=0.5, **keywords).sum().backward()
        return scores.policy_chosen.grad.item(), scores.policy_rejected.grad.item()

    for name in ("sigmoid", "bco_pair"):
        assert slope(name, 30.0, -30.0)[0] < 0 < slope(name, 30.0, -30.0)[1]
    assert slope("ipo", 0.5, -0.5, average=False) == pytest.approx((0, 0), abs=1e-12)
    chosen, rejected = slope("nca_pair", math.log(2) / 0.5, -30.0)
    assert chosen == pytest.approx(0, abs=1e-12) and rejected > 0


NO_MINIMUM = {
    "kto": "bounded", "apo_zero_unpaired": "bounded", "apo_zero": "bounded", "apo_down": "bounded",
    "slic": "diverges", "cpo": "diverges", "orpo": "diverges", "mapo": "diverges",
    "aot": "diverges", "aot_unpaired": "diverges", "discopop": "two valleys",
}  # fmt: skip


def test_every_row_s_statement_is_tested_or_says_that_there_is_no_minimum() -> None:
    tested = {case[0] for case in MARGINS} | set(UNPAIRED) | set(GROUP_LOSSES)
    for name, row in LOSSES.items():
        assert name in tested or NO_MINIMUM[name] in row.minimiser, name


@pytest.mark.parametrize("name", [n for n, why in NO_MINIMUM.items() if why == "diverges"])
def test_what_diverges_goes_on_falling_far_out(name) -> None:
    """Towards a certain chosen answer: the loss at 1, 10 and 100 nats of margin."""
    row = PREFERENCE_LOSSES[name]
    beta = row.golden.beta
    fields = {"chosen_length": 1.0, "rejected_length": 1.0}

    def loss(nats: float) -> float:
        if row.needs_reference:
            return row(pair_scores(nats, -nats, **fields), beta=beta).item()
        scores = pair_scores(-1 / nats, -1 - nats, **fields)
        return row(scores, beta=beta).item()

    assert loss(1) > loss(10) > loss(100)


def test_discopop_has_two_valleys() -> None:
    """The expected loss falls, rises, falls and rises along the margin."""
    h = torch.linspace(-10, 20, 3000)
    loss = PREFERENCE_LOSSES["discopop"](pair_scores(h, 0 * h, p_chosen=0.8), beta=0.5)
    turns = h[1:-1][loss.diff().sign().diff() != 0]
    assert turns.tolist() == pytest.approx([-0.29, 0.11, 3.13], abs=0.02)
