"""Every row on its standard example, and with other options, against numbers worked out elsewhere.

The numbers were computed with numpy from the papers' formulas, not with this library.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from alignkit.losses import LOSSES
from tests.losses.examples import DTYPES, answers, batch3, group, image_pair, one_pair, standard

DEFAULTS = {
    "sigmoid": (0.1, 0.6209570),
    "robust": (0.1, 0.6022070),
    "hinge": (0.1, 0.85),
    "ipo": (0.1, 22.4439062),
    "exo_pair": (0.1, 2.5055166),
    "discopop": (0.1, 0.8493376),
    "sigmoid_norm": (0.1, 0.6801083),
    "rdpo": (0.1, 0.6491593),
    "odpo": (0.1, 0.8833822),
    "dpop": (0.1, 0.6209570),
    "nca_pair": (0.1, 1.3508248),
    "bco_pair": (0.1, 1.3128563),
    "sppo_hard": (0.1, 36.25),
    "sppo": (0.1, 36.25),
    "apo_zero": (0.1, 0.9625234),
    "apo_down": (0.1, 0.9875493),
    "cal_dpo": (0.1, 36.4514133),
    "aot": (0.1, 0.6209570),
    "aot_unpaired": (0.1, 0.6209570),
    "beta_dpo": (0.1, 0.6209570),
    "slic": (1.0, 2.0),
    "simpo": (2.0, 2.1269280),
    "cpo": (0.1, 2.5981389),
    "orpo": (1.0, 2.1042058),
    "mapo": (0.1, 0.1577775),
    "plackett_luce": (0.1, 1.5770553),
    # ln(1 + e^-0.15) twice and ln(1 + e^-0.3), of s = [0.1, -0.05, -0.2].
    "all_pairs": (0.1, 0.5987564),
    "best_of_k": (0.1, 0.9560983),
    "kto": (0.1, 0.4812589),
    "apo_zero_unpaired": (0.1, 0.4812617),
    "bco": (0.1, 0.6563501),
    "nca": (0.1, 1.3508248 / 2),
}


def test_every_row_has_its_golden_and_states_it() -> None:
    assert set(DEFAULTS) == set(LOSSES) and len(LOSSES) >= 28
    for name, row in LOSSES.items():
        assert (row.golden.beta, row.golden.value) == pytest.approx(DEFAULTS[name], abs=5e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_standard_example(name, dtype) -> None:
    beta, golden = DEFAULTS[name]
    found = LOSSES[name](standard(name, dtype), beta=beta)
    assert found.dtype == dtype and found.ndim == 1
    assert found.mean().item() == pytest.approx(golden, rel=DTYPES[dtype])


def at(name: str, scores: Any, golden: float, *, beta: float = 0.1, **keywords: Any) -> Any:
    label = f"{name}-{','.join(keywords) or 'plain'}-{golden:g}"
    return pytest.param(name, scores, beta, keywords, golden, id=label)


LIKED = [True, True, True, False, False, False]
RANKED = [2.0, 1.0, 0.0, -1.0]
OTHERS = [
    at("sigmoid", one_pair(), 0.6359570, label_smoothing=0.1),
    at("sigmoid", one_pair(p_chosen=0.75), 0.6584570),
    at("sigmoid", one_pair(target_margin=0.5), 0.8833822),
    at("ipo", one_pair(), 12.25, average=False),
    # By hand: 1 - (0.15 - 0.5), and (1.5 - 0.5 / 0.1 - 5)^2.
    at("hinge", one_pair(target_margin=0.5), 1.35),
    at("ipo", one_pair(target_margin=0.5), 72.25, average=False),
    at("dpop", one_pair(policy_chosen=-12.0, policy_rejected=-14.0), 0.7709570, lam=3.0),
    # w = -1, l = -2.5: h = 1.5, the penalty 3 * 1 makes the logit -0.15.
    at("bco_pair", one_pair(), 2 * 0.6563501, shift=0.025),
    at("sppo", one_pair(p_chosen=0.5), 1.25),
    # Targets +-(0.75 - 0.5) / 0.1 = +-2.5: 1.5^2 + 2^2.
    at("sppo", one_pair(p_chosen=0.75), 6.25),
    at("slic", one_pair(), 1.0, beta=1.0, delta=1.0),
    at("cpo", one_pair(), 0.5981389, cpo_alpha=0.0),
    # 2 + 0.5 * 1.0420578, the odds ratio term of the standard example.
    at("orpo", one_pair(), 2.5210289, beta=1.0, lam=0.5),
    at("simpo", one_pair(), 1.3132617, beta=2.0, gamma_ratio=0.0),
    at("mapo", image_pair(), 0.1 + 0.2 * 0.577775, beta=0.2),
    at("sigmoid", batch3(), 0.7424071),
    at("sigmoid", batch3(p_chosen=[1, 0.6, 0.3]), 0.6174071),
    at("kto", answers([3.0, 0, -3, -1, 1.5, 1.5], LIKED, 0.3), 0.5082733),
    at("kto", answers([1.0], [True], 0.3), 0.4825071),
    at("kto", answers([-0.5], [False], 0.3), 0.4800107),
    # Diffusion-KTO: err of policy - reference = -0.0002, no one half, no baseline.
    at("apo_zero_unpaired", answers([2e-4], [True]), 0.2689414, beta=5000.0),
    at("apo_zero_unpaired", answers([2e-4], [False]), 0.7310586, beta=5000.0),
    at("bco", answers([3.0, 0, -3, -1, 1.5, 1.5], LIKED), 0.7145552),
    at("plackett_luce", group(RANKED, [0, 1, 2, 3]), 1.1610574, beta=1.0),
    at("all_pairs", group(RANKED, [0, 1, 2, 3]), 0.2070381, beta=1.0),
    at("best_of_k", group(RANKED, [0, 1, 2, 3]), 0.4401897, beta=1.0),
]


@pytest.mark.parametrize(("name", "scores", "beta", "keywords", "golden"), OTHERS)
def test_other_options_and_inputs(name, scores, beta, keywords, golden) -> None:
    found = LOSSES[name](scores, beta=beta, **keywords).mean().item()
    assert found == pytest.approx(golden, rel=1e-6)


MARGINS = {
    0: 0.2014133,
    1 / 3: 0.2710977,
    2 / 3: 0.3608848,
    1: 0.4740770,
    2: 0.974077,
    3: 1.7014133,
}


@pytest.mark.parametrize("margin", MARGINS)
def test_target_margin_is_subtracted_from_the_logit_after_beta(margin) -> None:
    scores = one_pair(target_margin=margin)  # h = 1.5
    found = LOSSES["sigmoid"](scores, beta=1.0)
    assert found.item() == pytest.approx(MARGINS[margin], abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_policy_at_reference_costs_what_the_row_says(name) -> None:
    """In Python numbers, at several betas; lengths and scores of the example are neutral ones."""
    half = {"kto": 0.5, "apo_zero_unpaired": 0.5, "apo_zero": 1.0, "apo_down": 1.0, "hinge": 1.0}
    two = dict.fromkeys(("nca_pair", "bco_pair"), 2 * math.log(2))
    for beta in (0.05, 0.1, 2.0, 5000.0):
        squares = {"ipo": 1 / (4 * beta**2), "cal_dpo": math.log(2) + 1 / (2 * beta**2)}
        squares |= dict.fromkeys(("sppo", "sppo_hard"), 1 / (2 * beta**2))
        others = {"exo_pair": 2.7612307, "discopop": 0.8465736, **half, **two, **squares}
        if LOSSES[name].needs_reference:
            wanted = others.get(name, math.log(2))
            assert LOSSES[name].at_reference(beta) == pytest.approx(wanted, rel=1e-7)
        else:
            assert LOSSES[name].at_reference is None


def test_every_row_says_what_it_is() -> None:
    for name, row in LOSSES.items():
        assert row.name == name and row.equation and row.minimiser and "arXiv:" in row.paper
        assert set(row.betas) == set(row.modalities)
        assert all(beta.value > 0 and beta.source for beta in row.betas.values())


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_needs_the_fields_it_says_and_no_others(name) -> None:
    row = LOSSES[name]
    scores = standard(name)
    optional = {
        f
        for f in vars(scores)
        if f.endswith("length") or f in ("score_chosen", "score_rejected", "uniform", "kl")
    }
    assert set(row.needs) <= optional
    for field in optional:
        without = type(scores)(**{**vars(scores), field: None})
        if field in row.needs:
            with pytest.raises(ValueError, match=f"`{field}`"):
                row(without, beta=0.1)
        else:
            assert torch.equal(row(without, beta=0.1), row(scores, beta=0.1))
