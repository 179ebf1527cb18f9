"""What rows do with options, columns and neutral values: honour them or refuse them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.losses import (
    LOSSES,
    PREFERENCE_LOSSES,
    GroupScores,
    PairScores,
    UnpairedScores,
)
from tests.builders import pair_scores
from tests.losses.examples import one_pair, standard


@pytest.mark.parametrize("name", LOSSES)
def test_an_unknown_keyword_is_refused_naming_the_options(name) -> None:
    row = LOSSES[name]
    with pytest.raises(ConfigError, match=f"'{name}' has no option 'label_smooting'") as error:
        row(standard(name), beta=0.1, label_smooting=0.1)
    for option in row.keywords:
        assert option in str(error.value)
    if not row.keywords:
        assert "Its options: none" in str(error.value)


RANGES = {
    ("sigmoid", "label_smoothing"): (-0.1, 0.6, math.nan),
    ("robust", "label_smoothing"): (-0.1, 0.5, math.nan),
    ("exo_pair", "label_smoothing"): (0.0, -0.1, 0.6, math.nan),
    ("discopop", "tau"): (0.0, -1.0, math.nan),
    ("beta_dpo", "rho"): (-0.1, 1.0, math.nan),
    ("beta_dpo", "momentum"): (-0.1, 1.0, math.nan),
    ("bco", "momentum"): (-0.1, 1.0, math.nan),
    ("orpo", "lam"): (-0.1, math.nan),
    ("slic", "lam"): (-0.1, math.nan),
    ("slic", "delta"): (-0.1, math.nan),
    ("dpop", "lam"): (-0.1, math.nan),
    ("cpo", "cpo_alpha"): (-0.1, math.nan),
    ("odpo", "alpha"): (-0.1, math.nan),
    ("mapo", "snr_scale"): (0.0, -0.5, math.nan),
    ("mapo", "timesteps"): (0.0, -1.0, math.nan),
    ("kto", "desirable_weight"): (-0.1, math.nan),
    ("nca", "undesirable_weight"): (-0.1, math.nan),
}


@pytest.mark.parametrize(("name", "option"), RANGES)
def test_a_number_outside_its_range_is_refused(name, option) -> None:
    for bad in RANGES[name, option]:
        with pytest.raises(ConfigError, match=option):
            LOSSES[name](standard(name), beta=0.1, **{option: bad})


FREE = {("rdpo", "length_coef"), ("bco_pair", "shift"), ("beta_dpo", "a"), ("simpo", "gamma_ratio")}
"""Options for which any number has a meaning."""


def test_every_number_of_an_option_has_a_range_or_is_free() -> None:
    for name, row in LOSSES.items():
        for option, default in row.keywords.items():
            known = option.endswith("desirable_weight") or (name, option) in {*RANGES, *FREE}
            assert isinstance(default, bool) or known, (name, option)


@pytest.mark.parametrize("name", LOSSES)
def test_the_probe_of_a_row_tries_out_its_options(name) -> None:
    row = LOSSES[name]
    found = row(row.probe(), beta=1.0, **row.keywords)
    assert found.ndim == 1 and found.isfinite().all()


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_neutral_columns_are_bitwise_the_plain_loss(name) -> None:
    row = PREFERENCE_LOSSES[name]
    draw = torch.Generator().manual_seed(0)
    w, ell = torch.randn(2, 64, generator=draw) * 9
    fixed = {
        "chosen_length": 5.0,
        "rejected_length": 8.0,
        "uniform": torch.rand(64, generator=draw),
    }
    fixed |= {"score_chosen": 3.0, "score_rejected": 1.0}

    def loss(**more: float) -> torch.Tensor:
        scores = pair_scores(w, ell, dtype=torch.float32, **fixed, **more)
        return row(scores, beta=0.1)

    plain = loss()
    for field, value in {"p_chosen": 1.0, "target_margin": 0.0}.items():
        if field not in row.refuses:
            assert torch.equal(loss(**{field: value}), plain), field
    if row.coupled:
        torch.testing.assert_close(loss(weight=1.0), plain)
    else:
        assert torch.equal(loss(weight=1.0), plain)


NEUTRAL = {
    "sigmoid": {"label_smoothing": 0.0},
    "robust": {"label_smoothing": 0.0},
    "rdpo": {"length_coef": 0.0},
    "odpo": {"alpha": 0.0},
    "dpop": {"lam": 0.0},
    "beta_dpo": {"a": 0.0, "rho": 0.0},
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_options_leave_plain_dpo(name) -> None:
    scores = replace(one_pair(), p_chosen=torch.tensor([0.7]), target_margin=torch.tensor([0.2]))
    dpo = PREFERENCE_LOSSES["sigmoid"](scores, beta=0.1)
    assert torch.equal(PREFERENCE_LOSSES[name](scores, beta=0.1, **NEUTRAL[name]), dpo)


SYMMETRIC = [n for n, row in PREFERENCE_LOSSES.items() if "swap" in row.laws]


@pytest.mark.parametrize("name", SYMMETRIC)
def test_an_undecided_pair_does_not_know_its_label(name) -> None:
    lengths = {"chosen_length": 5.0, "rejected_length": 5.0, "score_chosen": 2.0}
    w, ell = torch.linspace(-20, 20, 9), torch.linspace(5, -9, 9)
    row = PREFERENCE_LOSSES[name]
    fields = {"p_chosen": 0.5, "score_rejected": 1.0, **lengths}
    one = row(pair_scores(w, ell, **fields), beta=0.3)
    other = row(pair_scores(ell, w, **fields), beta=0.3)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


REFUSED = [(n, field) for n, row in LOSSES.items() for field in row.refuses]


@pytest.mark.parametrize(("name", "field"), REFUSED)
def test_a_column_without_meaning_is_refused_with_the_reason(name, field) -> None:
    scores = replace(standard(name), **{field: torch.ones(1).double()})
    with pytest.raises(ConfigError, match=f"'{name}' does not take {field}: .{{20,}}"):
        LOSSES[name](scores, beta=0.1)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_target_margin_and_p_chosen_are_honoured_or_refused(name) -> None:
    row = PREFERENCE_LOSSES[name]
    scores = standard(name)
    plain = row(scores, beta=0.3)
    for field, value in {"target_margin": 0.7, "p_chosen": 0.6}.items():
        if field not in row.refuses:
            given = replace(scores, **{field: torch.tensor([value]).double()})
            assert not torch.allclose(row(given, beta=0.3), plain), field


def test_a_column_against_a_vector_is_refused_with_both_names_and_shapes() -> None:
    vector, column = torch.zeros(4), torch.zeros(4, 1)
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    for bad in names:
        given: dict[str, Any] = {name: column if name == bad else vector for name in names}
        with pytest.raises(ValueError) as error:
            PairScores(**given)
        others = [name for name in names if name != bad and f"{name} (4,)" in str(error.value)]
        assert f"{bad} (4, 1)" in str(error.value) and others
    with pytest.raises(ValueError, match=r"policy_chosen \(4,\) and weight \(3,\)"):
        PairScores(vector, vector, vector, vector, weight=torch.zeros(3))
    with pytest.raises(ValueError, match=r"policy \(4,\) and kl \(3,\)"):
        UnpairedScores(vector, vector, vector > 0, kl=torch.zeros(3))
    table = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="one shape"):
        GroupScores(table, table, table.long(), torch.ones(4, 2).bool())
    with pytest.raises(ValueError, match=r"weight \(3,\) for policy \(4, 3\)"):
        GroupScores(table, table, table.long(), table > 0, weight=torch.zeros(3))
