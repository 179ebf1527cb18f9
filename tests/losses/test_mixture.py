"""Weighted sums of losses are sums, in value, label handling, state and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.losses import PREFERENCE_LOSSES, UNPAIRED_LOSSES, weighted_sum
from tests.laws.loss_laws import LAWS
from tests.laws.test_loss_laws import example
from tests.losses.examples import answers, batch3, one_pair


def test_mpo_of_one_pair() -> None:
    """0.8 sigmoid + 0.2 bco_pair = 0.8 * 0.6209570 + 0.2 * 1.3128563."""
    row = weighted_sum({"sigmoid": 0.8, "bco_pair": 0.2}, PREFERENCE_LOSSES)
    found = row(one_pair(), beta=0.1).item()
    assert found == pytest.approx(0.8 * 0.6209570 + 0.2 * 1.3128563, abs=1e-6)
    assert row.at_reference(0.1) == pytest.approx((0.8 + 0.4) * 0.6931472, abs=1e-6)
    assert row.betas["text"].value == 0.1 and row.scale_free


def test_each_part_handles_the_label_by_itself() -> None:
    scores = batch3(p_chosen=[1, 0.6, 0.3])
    row = weighted_sum({"sigmoid": 1, "sppo": 0.5}, PREFERENCE_LOSSES)
    parts = [PREFERENCE_LOSSES[name](scores, beta=0.1) for name in ("sigmoid", "sppo")]
    torch.testing.assert_close(row(scores, beta=0.1), parts[0] + 0.5 * parts[1])


def test_keywords_go_to_the_parts_that_have_them() -> None:
    row = weighted_sum({"sigmoid": 1, "robust": 1, "bco_pair": 1}, PREFERENCE_LOSSES)
    assert set(row.keywords) == {"label_smoothing", "shift"}
    found = row(one_pair(), beta=0.1, label_smoothing=0.2, shift=0.3)
    table = PREFERENCE_LOSSES
    wanted = (
        table["sigmoid"](one_pair(), beta=0.1, label_smoothing=0.2)
        + table["robust"](one_pair(), beta=0.1, label_smoothing=0.2)
        + table["bco_pair"](one_pair(), beta=0.1, shift=0.3)
    )
    torch.testing.assert_close(found, wanted)
    plain = row(one_pair(), beta=0.1)
    assert plain.item() == pytest.approx(0.6209570 + 0.6022070 + 1.3128563, abs=1e-6)
    with pytest.raises(ConfigError, match="has no option 'tau'"):
        row(one_pair(), beta=0.1, tau=0.1)


def test_states_of_parts_stay_apart() -> None:
    row = weighted_sum({"sigmoid": 1, "beta_dpo": 2}, PREFERENCE_LOSSES)
    assert row.coupled and not row.scale_free and row.needs == ("uniform",)
    first = row.next_state(batch3(), {}, beta=0.1)
    assert {name.split("/")[0] for name in first} == {"beta_dpo"}
    own = PREFERENCE_LOSSES["beta_dpo"].next_state(batch3(), {}, beta=0.1)
    found = row(batch3(), beta=0.1, rho=0.0, state=first)
    wanted = PREFERENCE_LOSSES["sigmoid"](batch3(), beta=0.1)
    wanted = wanted + 2 * PREFERENCE_LOSSES["beta_dpo"](batch3(), beta=0.1, rho=0.0, state=own)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(row(batch3(), beta=0.1, rho=0.0), found)


def test_single_answers_sum_too() -> None:
    scores = answers([1.0, -0.5], [True, False], 0.3)
    row = weighted_sum({"kto": 1, "nca": 3}, UNPAIRED_LOSSES)
    found = row(scores, beta=0.1, desirable_weight=0.5)
    parts = [UNPAIRED_LOSSES[n](scores, beta=0.1, desirable_weight=0.5) for n in ("kto", "nca")]
    torch.testing.assert_close(found, parts[0] + 3 * parts[1])


SUMS = [{"sigmoid": 0.8, "bco_pair": 0.2}, {"ipo": 1, "hinge": 2}, {"sigmoid": 1, "simpo": 0.1}]


@pytest.mark.parametrize("weights", SUMS, ids=" ".join)
def test_a_sum_obeys_the_laws_that_it_claims_and_no_others(weights) -> None:
    row = weighted_sum(weights, PREFERENCE_LOSSES)
    assert row.laws
    for name, law in LAWS.items():
        if name == "step0" and row.at_reference is None:
            continue
        scores = example(PREFERENCE_LOSSES["nca_pair"])  # without an offset
        left, right = law(row, scores, 0.3, 1.7)
        assert torch.allclose(left, right, rtol=1e-7, atol=1e-7) == (name in row.laws), name


def test_a_sum_refuses_and_needs_what_any_part_does() -> None:
    row = weighted_sum({"sigmoid": 1, "apo_zero": 1, "simpo": 1}, PREFERENCE_LOSSES)
    with pytest.raises(ConfigError, match="target_margin"):
        row(replace(one_pair(), target_margin=torch.ones(1).double()), beta=0.1)
    with pytest.raises(ValueError, match="`chosen_length`"):
        row(replace(one_pair(), chosen_length=None), beta=0.1)
    assert row.needs_reference and row.no_divergence and row.at_reference is None
    assert not row.scale_free and row.modalities == ("text", "image")
    assert weighted_sum({"mapo": 1, "hinge": 1}, PREFERENCE_LOSSES).modalities == ("image",)


def test_betas_that_differ_leave_no_default() -> None:
    row = weighted_sum({"sigmoid": 1, "sppo_hard": 1}, PREFERENCE_LOSSES)
    assert set(row.defaults) == {"image"}
    # Two losses whose size moves differently with beta share no unit-free weight.
    assert not row.scale_free and "scaling" not in row.laws


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "at least one"),
        ({"sigmod": 1}, "Unknown loss 'sigmod'"),
        ({"kto": 1}, "Unknown loss 'kto'"),
        ({"sigmoid": 0}, "above 0"),
        ({"sigmoid": True}, "above 0"),
        ({"sigmoid": float("nan")}, "above 0"),
    ],
)
def test_what_is_no_sum_is_refused(weights, message) -> None:
    with pytest.raises(ConfigError, match=message):
        weighted_sum(weights, PREFERENCE_LOSSES)
