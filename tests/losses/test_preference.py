"""Pairwise losses against hand-worked numbers, own derivations, and direct minimisation."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import minimize_scalar

from alignkit.errors import ConfigError
from alignkit.losses import PREFERENCE_LOSSES, PairScores
from tests.builders import pair_scores

DTYPES = {torch.float64: 1e-6, torch.float32: 1e-5}
MARGIN = ["sigmoid", "robust", "hinge", "ipo"]
GRID = (-30.0, -3.0, 0.0, 0.5, 3.0, 30.0)


def one_pair(dtype: torch.dtype = torch.float64, **more: float) -> PairScores:
    """w = 1, l = -0.5; the chosen answer has 5 tokens, the rejected one 8."""

    def one(value: float) -> torch.Tensor:
        return torch.tensor([value], dtype=dtype)

    return PairScores(
        one(-10.0),
        one(-12.0),
        one(-11.0),
        one(-11.5),
        chosen_length=one(5.0),
        rejected_length=one(8.0),
        **{name: one(value) for name, value in more.items()},
    )


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def minus_log_sigma(x: float) -> float:
    return math.log1p(math.exp(-x)) if x > 0 else -x + math.log1p(math.exp(x))


ONE_PAIR = [
    ("sigmoid", {}, {}, 0.6209570),
    ("sigmoid", {"label_smoothing": 0.1}, {}, 0.6359570),
    ("robust", {"label_smoothing": 0.1}, {}, 0.6022070),
    ("hinge", {}, {}, 0.85),
    ("ipo", {"average": False}, {}, 12.25),
    ("ipo", {"average": True}, {}, 22.4439062),
    ("sigmoid", {}, {"p_chosen": 0.75}, 0.6584570),
    ("sigmoid", {}, {"target_margin": 0.5}, 0.8833822),
    # By hand: 1 - (0.15 - 0.5), and (1.5 - 0.5 / 0.1 - 5)^2.
    ("hinge", {}, {"target_margin": 0.5}, 1.35),
    ("ipo", {"average": False}, {"target_margin": 0.5}, 72.25),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "keywords", "more", "golden"), ONE_PAIR)
def test_one_pair(name, keywords, more, golden, dtype) -> None:
    found = PREFERENCE_LOSSES[name](one_pair(dtype, **more), beta=0.1, **keywords)
    assert found.shape == (1,) and found.dtype == dtype
    assert found.item() == pytest.approx(golden, rel=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p_chosen", "golden"), [(None, 0.7424071), ([1, 0.6, 0.3], 0.6174071)])
def test_batch_of_three(p_chosen, golden, dtype) -> None:
    scores = PairScores(
        torch.tensor([-10.0, -8, -20], dtype=dtype),
        torch.tensor([-12.0, -7, -15], dtype=dtype),
        torch.tensor([-13.0, -8, -17], dtype=dtype),
        torch.tensor([-11.0, -8.5, -16.5], dtype=dtype),
        p_chosen=None if p_chosen is None else torch.tensor(p_chosen, dtype=dtype),
    )
    found = PREFERENCE_LOSSES["sigmoid"](scores, beta=0.1).mean()
    assert found.item() == pytest.approx(golden, rel=DTYPES[dtype])


@pytest.mark.parametrize(
    ("margin", "golden"),
    [
        (0, 0.2014133),
        (1 / 3, 0.2710977),
        (2 / 3, 0.3608848),
        (1, 0.4740770),
        (2, 0.9740770),
        (3, 1.7014133),
    ],
)
def test_target_margin_is_subtracted_from_the_logit_after_beta(margin, golden) -> None:
    scores = pair_scores(1.0, -2.0, target_margin=margin)  # h = 3
    found = PREFERENCE_LOSSES["sigmoid"](scores, beta=0.5)
    assert found.item() == pytest.approx(golden, abs=1e-6)


def oracle(name: str, b: float, w: float, ell: float, e: float) -> tuple[float, float]:
    """(loss, d loss / d w) by the formulas, in Python numbers."""
    h = w - ell
    if name == "sigmoid":
        value = (1 - e) * minus_log_sigma(b * h) + e * minus_log_sigma(-b * h)
        return value, b * (sigma(b * h) - (1 - e))
    if name == "robust":
        value = ((1 - e) * minus_log_sigma(b * h) - e * minus_log_sigma(-b * h)) / (1 - 2 * e)
        return value, b * (-(1 - e) * sigma(-b * h) - e * sigma(b * h)) / (1 - 2 * e)
    if name == "hinge":
        return max(0.0, 1 - b * h), -b if b * h < 1 else 0.0
    return (h - 1 / (2 * b)) ** 2, 2 * (h - 1 / (2 * b))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("name", ["sigmoid", "robust", "hinge", "ipo"])
def test_values_and_gradients_follow_the_formula(name, smoothing) -> None:
    keywords = {"sigmoid": {"label_smoothing": smoothing}, "robust": {"label_smoothing": smoothing}}
    given = keywords.get(name, {"average": False} if name == "ipo" else {})
    # torch calls softplus(x) linear above 20, which costs 2e-9.
    for beta in (0.1, 0.7):
        for w, ell in [(w, ell) for w in GRID for ell in GRID]:
            scores = pair_scores(w, ell)
            scores.policy_chosen.requires_grad_()
            scores.policy_rejected.requires_grad_()
            loss = PREFERENCE_LOSSES[name](scores, beta=beta, **given)
            loss.sum().backward()
            value, slope = oracle(name, beta, w, ell, smoothing)
            assert loss.item() == pytest.approx(value, rel=1e-8, abs=1e-12)
            assert scores.policy_chosen.grad.item() == pytest.approx(slope, rel=1e-8, abs=1e-12)
            assert scores.policy_rejected.grad.item() == pytest.approx(-slope, rel=1e-8, abs=1e-12)


def test_ipo_averages_each_log_ratio_over_its_own_completion() -> None:
    scores = pair_scores(3.0, -2.0, chosen_length=4.0, rejected_length=10.0)
    scores.policy_chosen.requires_grad_()
    scores.policy_rejected.requires_grad_()
    loss = PREFERENCE_LOSSES["ipo"](scores, beta=0.5)
    loss.sum().backward()
    gap = 3 / 4 + 2 / 10 - 1
    assert loss.item() == pytest.approx(gap**2, rel=1e-12)
    assert scores.policy_chosen.grad.item() == pytest.approx(2 * gap / 4, rel=1e-12)
    assert scores.policy_rejected.grad.item() == pytest.approx(-2 * gap / 10, rel=1e-12)


def test_gradient_identity_of_dpo_on_one_pair() -> None:
    scores = one_pair()
    scores.policy_chosen.requires_grad_()
    PREFERENCE_LOSSES["sigmoid"](scores, beta=0.1).sum().backward()
    assert scores.policy_chosen.grad.item() == pytest.approx(-0.0462570, abs=1e-7)


@pytest.mark.parametrize("name", MARGIN)
def test_gradients_equal_central_differences(name) -> None:
    row, step = PREFERENCE_LOSSES[name], 1e-4
    more = {"chosen_length": 5.0, "rejected_length": 8.0, "target_margin": 0.2, "p_chosen": 0.8}
    for w, ell in [(w, ell) for w in GRID for ell in GRID]:
        sides = [torch.tensor([w]).double(), torch.tensor([ell]).double()]
        for side in (0, 1):
            moved = [[s.clone() for s in sides] for _ in range(2)]
            moved[0][side] += step
            moved[1][side] -= step
            up, down = (row(pair_scores(*m, **more), beta=0.3) for m in moved)
            leaves = [s.clone().requires_grad_() for s in sides]
            row(pair_scores(*leaves, **more), beta=0.3).sum().backward()
            found = leaves[side].grad.item()
            assert found == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-5, abs=1e-7)


LOGISTIC = [
    ("sigmoid", {}),
    ("sigmoid", {"label_smoothing": 0.1}),
    *(("sigmoid", {"label_smoothing": e / 40}) for e in range(2, 21)),
    ("robust", {}),
    ("robust", {"label_smoothing": 0.37}),
]


@pytest.mark.parametrize("p_chosen", [None, 0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize(("name", "keywords"), LOGISTIC)
def test_policy_at_reference_costs_ln_2_to_the_last_bit(name, keywords, p_chosen) -> None:
    scores = pair_scores([0.0] * 4, [0.0] * 4, dtype=torch.float32, p_chosen=p_chosen)
    found = PREFERENCE_LOSSES[name](scores, beta=0.1, **keywords)
    assert torch.equal(found, torch.full((4,), math.log(2)))


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0, 5000.0])
@pytest.mark.parametrize("name", MARGIN)
def test_policy_at_reference_costs_what_the_row_says(name, beta) -> None:
    scores = pair_scores(0.0, 0.0, chosen_length=5.0, rejected_length=8.0)
    found = PREFERENCE_LOSSES[name](scores, beta=beta).item()
    by_hand = {"sigmoid": 0.6931471805599453, "robust": 0.6931471805599453, "hinge": 1.0}
    assert found == pytest.approx(by_hand.get(name, 0.25 / beta**2), rel=1e-12)
    assert PREFERENCE_LOSSES[name].at_reference(beta) == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("name", MARGIN)
def test_neutral_options_are_bitwise_the_plain_loss(name) -> None:
    row = PREFERENCE_LOSSES[name]
    draw = torch.Generator().manual_seed(0)
    w, ell = torch.randn(2, 64, generator=draw) * 9
    lengths = {"chosen_length": 5.0, "rejected_length": 8.0}

    def loss(keywords: dict[str, float] | None = None, **more: float) -> torch.Tensor:
        scores = pair_scores(w, ell, dtype=torch.float32, **lengths, **more)
        return row(scores, beta=0.1, **(keywords or {}))

    plain = loss()
    for neutral in ({"p_chosen": 1.0}, {"target_margin": 0.0}, {"weight": 1.0}):
        assert torch.equal(loss(**neutral), plain), neutral
    if "label_smoothing" in row.keywords:
        logit = 0.1 * (w - ell)
        expected = torch.nn.functional.softplus(-logit)
        torch.testing.assert_close(loss({"label_smoothing": 0.0}), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("q", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_soft_labels_equal_label_smoothing(q) -> None:
    w, ell = torch.linspace(-20, 20, 9), torch.linspace(5, -9, 9)
    soft = PREFERENCE_LOSSES["sigmoid"](pair_scores(w, ell, p_chosen=q), beta=0.3)
    e = min(q, 1 - q)  # below one half the pair is smoothed with the opposite label
    scores = pair_scores(w, ell) if q >= 0.5 else pair_scores(ell, w)
    smooth = PREFERENCE_LOSSES["sigmoid"](scores, beta=0.3, label_smoothing=e)
    torch.testing.assert_close(soft, smooth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MARGIN)
def test_an_undecided_pair_does_not_know_its_label(name) -> None:
    lengths = {"chosen_length": 5.0, "rejected_length": 5.0}
    w, ell = torch.linspace(-20, 20, 9), torch.linspace(5, -9, 9)
    row = PREFERENCE_LOSSES[name]
    one = row(pair_scores(w, ell, p_chosen=0.5, **lengths), beta=0.3)
    other = row(pair_scores(ell, w, p_chosen=0.5, **lengths), beta=0.3)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_robust_is_unbiased_under_flipped_labels() -> None:
    w, ell, e = torch.linspace(-20, 20, 9), torch.linspace(5, -9, 9), 0.2
    row = PREFERENCE_LOSSES["robust"]
    right = row(pair_scores(w, ell), beta=0.3, label_smoothing=e)
    wrong = row(pair_scores(ell, w), beta=0.3, label_smoothing=e)
    clean = torch.nn.functional.softplus(-0.3 * (w - ell).double())
    torch.testing.assert_close((1 - e) * right + e * wrong, clean, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0, 5000.0])
@pytest.mark.parametrize("name", MARGIN)
def test_finite_at_large_log_ratios_in_float32(name, beta) -> None:
    far = [1e4, -1e4, 1e4, -1e4, 0.0]
    w = torch.tensor(far, requires_grad=True)
    ell = torch.tensor([-1e4, 1e4, 1e4, 0.0, 1e4], requires_grad=True)
    lengths = {"chosen_length": 5.0, "rejected_length": 8.0}
    for q in (None, 0.3):
        scores = pair_scores(w, ell, dtype=torch.float32, p_chosen=q, **lengths)
        loss = PREFERENCE_LOSSES[name](scores, beta=beta)
        gradients = torch.autograd.grad(loss.sum(), (w, ell))
        assert loss.isfinite().all()
        assert all(g.isfinite().all() for g in gradients)


def noisy_margin_optimum(p: float, m: float) -> float:
    """d* = ln[(M(2p-1) + sqrt(M^2 (2p-1)^2 + 4p(1-p))) / (2(1-p))] with M = e^m."""
    big = math.exp(m) * (2 * p - 1)
    return math.log((big + math.sqrt(big**2 + 4 * p * (1 - p))) / (2 * (1 - p)))


MINIMISERS = [
    ("sigmoid", {}, 0.8, 0.5, 0.0, 2.7725887),
    ("sigmoid", {"label_smoothing": 0.1}, 0.8, 0.5, 0.0, 2.0919370),
    # Labels flipped with probability 0.1: 0.9 * 0.8 + 0.1 * 0.2 = 0.74.
    ("robust", {"label_smoothing": 0.1}, 0.74, 0.5, 0.0, 2.7725887),
    ("ipo", {"average": False}, 0.8, 0.5, 0.0, 0.6),
    ("ipo", {"average": False}, 1.0, 0.5, 0.0, 1.0),
    ("hinge", {}, 0.8, 0.5, 0.0, 2.0),
    ("hinge", {}, 0.6, 0.5, 0.0, 2.0),
    ("sigmoid", {}, 0.8, 1.0, 1 / 3, 1.6071666),
    ("sigmoid", {}, 0.8, 1.0, 1.0, 2.1539621),
    ("sigmoid", {}, 0.8, 1.0, 3.0, 4.0997121),
    ("sigmoid", {}, 0.6, 1.0, 1.0, 0.7324731),
]


@pytest.mark.parametrize(("name", "keywords", "p", "beta", "margin", "golden"), MINIMISERS)
def test_population_minimiser(name, keywords, p, beta, margin, golden) -> None:
    def population(h: float) -> float:
        scores = pair_scores(h, 0.0, p_chosen=p, target_margin=margin)
        return PREFERENCE_LOSSES[name](scores, beta=beta, **keywords).item()

    found = minimize_scalar(population, bounds=(-20, 20), method="bounded", options={"xatol": 1e-9})
    assert found.x == pytest.approx(golden, abs=1e-4)
    if margin:
        assert noisy_margin_optimum(p, margin) == pytest.approx(golden, abs=1e-6)


def test_a_column_against_a_vector_is_refused_with_both_names_and_shapes() -> None:
    vector, column = torch.zeros(4), torch.zeros(4, 1)
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    for bad in names:
        given = {name: column if name == bad else vector for name in names}
        with pytest.raises(ValueError) as error:
            PairScores(**given)
        others = [name for name in names if name != bad and f"{name} (4,)" in str(error.value)]
        assert f"{bad} (4, 1)" in str(error.value) and others
    with pytest.raises(ValueError, match=r"policy_chosen \(4,\) and weight \(3,\)"):
        PairScores(vector, vector, vector, vector, weight=torch.zeros(3))


@pytest.mark.parametrize("name", MARGIN)
def test_an_unknown_keyword_is_refused_naming_the_options(name) -> None:
    row = PREFERENCE_LOSSES[name]
    with pytest.raises(ConfigError, match=f"'{name}' has no option 'label_smooting'") as error:
        row(one_pair(), beta=0.1, label_smooting=0.1)
    for option in row.keywords:
        assert option in str(error.value)
    if not row.keywords:
        assert "Its options: none" in str(error.value)


@pytest.mark.parametrize(
    ("name", "bad"),
    [("sigmoid", -0.1), ("sigmoid", 0.6), ("robust", 0.5), ("robust", -0.1), ("sigmoid", math.nan)],
)
def test_label_smoothing_outside_its_range_is_refused(name, bad) -> None:
    with pytest.raises(ConfigError, match="label_smoothing"):
        PREFERENCE_LOSSES[name](one_pair(), beta=0.1, label_smoothing=bad)


def test_ipo_by_tokens_without_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match="chosen_length"):
        PREFERENCE_LOSSES["ipo"](pair_scores(1.0, 0.0), beta=0.1)


@pytest.mark.parametrize("name", MARGIN)
def test_every_row_says_what_it_is(name) -> None:
    row = PREFERENCE_LOSSES[name]
    assert row.name == name and row.equation and "arXiv:" in row.paper
    assert set(row.defaults) == set(row.betas) == {"text", "image"}
    assert all(beta.value > 0 and beta.source for beta in row.betas.values())
