"""Methods and their options: what is refused before any weight is loaded, and why."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest
import yaml

from alignkit import (
    DPO,
    KTO,
    SFT,
    ConfigError,
    DataError,
    PrecomputedReference,
    TextOptions,
    align,
)
from alignkit.checks.rows import check_labels
from alignkit.config import RunConfig, check, from_mapping, to_mapping
from alignkit.criteria import criterion_of, describe, loss_of
from alignkit.labels import Labels, pair_label
from alignkit.losses import LOSSES, PREFERENCE_LOSSES, UNPAIRED_LOSSES
from alignkit.losses.divergences import DIVERGENCES
from alignkit.methods import Divergence


def run(method: Any, **more: Any) -> RunConfig:
    return RunConfig("some/model", method, "pairs.jsonl", **more)


TABLE = {"reference": PrecomputedReference({0: [-1.0, -2.0]})}
REFUSED: list[tuple[Any, str, dict[str, Any], str]] = [
    (DPO("kto"), "text", {}, "'kto' takes other rows than DPO reads; write KTO(loss='kto')"),
    (KTO("sigmoid"), "text", {}, "other rows than KTO reads; write DPO(loss='sigmoid')"),
    (KTO("kt"), "text", {}, "Unknown loss 'kt'. Did you mean 'kto'? Known: apo_zero_unpaired, bco"),
    (DPO({"sigmoid": 1, "plackett_luce": 1}), "text", {}, "take the same kind of rows, and 'pla"),
    (DPO({"simpo": 1, "sigmoid": 1}), "text", {}, "different default betas, so that method.beta"),
    (DPO("simpo", gamma=1), "text", {}, "has no option 'gamma'. Did you mean 'gamma_ratio'?"),
    (DPO({"ipo": 1, "robust": 1}, tau=1), "text", {}, "Its options: average, label_smoothing"),
    (DPO("discopop", tau="x"), "text", {}, "method.tau must be a number; got 'x'"),
    (KTO("bco", momentum=2.0), "text", {}, "momentum"),
    (DPO("mapo"), "text", {}, "'mapo' is made for image policies; the policy is of modality 'text"),
    (DPO("simpo"), "image", {}, "Write timestep_weighting='nats', or take a loss such as"),
    (DPO("mapo", timestep_weighting="nats"), "image", {}, "a function of an image's mean squared"),
    (DPO(ld_alpha=0.5), "image", {}, "method.ld_alpha is an option of text policies only"),
    (DPO(weighting="wpo"), "image", {}, "method.weighting is an option of text policies only"),
    (DPO(safeguard=0.6), "text", {}, "method.safeguard is an option of image policies only: it"),
    (DPO(timestep_weighting="elbo"), "text", {}, "timestep_weighting is an option of image polic"),
    (KTO(timestep_weighting="nats"), "text", {}, "timestep_weighting is an option of image polic"),
    (DPO("best_of_k", weighting="wpo"), "text", {}, "weighting is an option of losses of pairs on"),
    (DPO("best_of_k", safeguard=0.6), "image", {}, "safeguard is an option of losses of pairs on"),
    (DPO("aot", weighting="wpo"), "text", {}, "'aot' does not take weighting='wpo'"),
    (DPO(divergence="jensen"), "text", {}, "method.divergence must be 'reverse_kl' or 'forward_kl"),
    (DPO("cal_dpo", divergence="alpha"), "text", {}, "'cal_dpo' does not take divergence='alpha'"),
    (DPO("simpo", divergence="forward_kl"), "text", {}, "does not take divergence='forward_kl': i"),
    (DPO(divergence="js_divergence"), "image", {}, "needs log-ratios in nats, and those of images"),
    (DPO(divergence="alpha", divergence_alpha=1.0), "text", {}, "must be between 0 and 1; got 1.0"),
    (DPO(divergence_alpha=0.3), "text", {}, "method.divergence_alpha belongs to divergence='alph"),
    (DPO(ld_alpha=0.5), "text", TABLE, "needs the reference's likelihood of a part of each answe"),
    (KTO(), "text", TABLE, "another prompt's answer, of which a precomputed reference knows nothi"),
    (DPO("simpo"), "text", {"reference": "frozen"}, "'simpo' uses no reference; got reference='f"),
    (DPO("sigmoid"), "text", {"reference": "none"}, "compares the policy with a reference; got"),
    (KTO(lambda scores: 0), "text", {}, "method.loss is called as loss(scores, beta=...)"),
    (DPO(), "text", {"data_options": TextOptions(truncation="split")}, "makes several rows of a l"),
    (KTO(), None, {"data_options": {"truncation": "split"}}, "and KTO compares answers to prompts"),
    (SFT("nl"), "text", {}, "Unknown loss 'nl'. Did you mean 'nll'? Known: dft, nll"),
    (SFT("sigmoid"), "text", {}, "takes other rows than SFT reads; write DPO(loss='sigmoid')"),
    (DPO("dft"), "text", {}, "takes other rows than DPO reads; write SFT(loss='dft')"),
    (SFT(), "text", {"reference": "frozen"}, "Supervised fine-tuning compares with no reference"),
    (SFT(), "text", TABLE, "compares with no reference"),
    (SFT(loss_on="answer"), "text", {}, "method.loss_on must be 'completion' or 'all' or 'assis"),
    (SFT(timestep_weighting="elbo"), "text", {}, "timestep_weighting is an option of image polic"),
    (SFT(timesteps=(3,)), "text", {}, "method.timesteps is an option of image policies only"),
    (SFT("dft"), "image", {}, "weighs each token by its own probability, and the likelihood of an"),
    (SFT(loss_on="all"), "image", {}, "method.loss_on is an option of text policies only: it choo"),
    (SFT(neftune_alpha=5), "image", {}, "method.neftune_alpha is an option of text policies only"),
    (SFT(), "text", {"reward": len}, "SFT learns from data"),
]


@pytest.mark.parametrize(("method", "modality", "more", "message"), REFUSED, ids=lambda v: str(v))
def test_what_a_method_cannot_do_is_refused_with_the_reason(
    method, modality, more, message
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check(run(method, **more), modality)


ALLOWED: list[tuple[Any, str, dict[str, Any]]] = [
    (DPO("simpo", timestep_weighting="nats"), "image", {}),
    (DPO("mapo", timestep_weighting="min_snr"), "image", {}),
    (DPO(divergence="alpha", divergence_alpha=0.2, timestep_weighting="nats"), "image", {}),
    (DPO("ipo", safeguard=0.6, anchor=0.1, timestep_weighting="elbo"), "image", {}),
    (DPO("hinge", weighting="wpo", ld_alpha=0.4, anchor=1.0), "text", {}),
    (DPO("aot", ld_alpha=0.4, anchor=1.0), "text", {}),
    (DPO("plackett_luce", divergence="js_divergence", ld_alpha=0.5, anchor=1.0), "text", {}),
    (DPO({"sigmoid": 0.8, "bco_pair": 0.2}, divergence="reverse_kl"), "text", {}),
    (DPO({"simpo": 1, "sigmoid": 1}, beta=0.5), "text", {}),
    (KTO("bco", momentum=0.5, desirable_weight=1.3), "text", TABLE),
    (KTO(lambda scores, *, beta: scores.log_ratio), "image", {}),
    (DPO(lambda scores, *, beta: scores.margin), "text", {"reference": "none"}),
]


@pytest.mark.parametrize(("method", "modality", "more"), ALLOWED, ids=lambda v: str(v))
def test_what_goes_together_is_let_through(method, modality, more) -> None:
    check(run(method, **more), modality)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ld_alpha": 1.5}, "method.ld_alpha must be between 0 and 1; got 1.5"),
        ({"anchor": -1}, "method.anchor must be a number, at least 0; got -1"),
        ({"safeguard": 1.0}, "method.safeguard must be below 1"),
        ({"safeguard": True}, "method.safeguard must be between 0 and 1; got True"),
        ({"loss": {}}, "needs at least one loss"),
        ({"loss": {"sigmoid": 0}}, "method.loss.sigmoid must be a number above 0; got 0"),
        ({"loss": 3}, "a mapping from names to weights, or a function of scores; got int"),
        ({"beta": 0}, "method.beta must be a number above 0; got 0"),
    ],
)
def test_values_out_of_range_are_refused_when_a_method_is_made(options, message) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        DPO(**options)


def test_a_method_says_what_it_does() -> None:
    method = DPO({"sigmoid": 0.8, "bco_pair": 0.2}, anchor=0.5, label_smoothing=0.1)
    told = describe(method, "text")
    assert told["loss"] == "0.8 sigmoid + 0.2 bco_pair" and told["beta"] == 0.1
    assert told["anchor"] == 0.5 and told["label_smoothing"] == 0.1 and "safeguard" not in told
    assert "2305.18290" in told["paper"] and "2404.04656" in told["paper"]
    assert repr(method).startswith("DPO(loss={'sigmoid': 0.8, 'bco_pair': 0.2}, beta=None, anchor")
    nats = describe(DPO("simpo", timestep_weighting="nats"), "image")
    assert nats["beta"] == LOSSES["simpo"].betas["text"].value
    assert nats["beta_convention"].startswith("per nat of the ELBO")
    assert "equation" in describe(KTO(), "image") and describe(KTO(), "image")["beta"] == 2000
    assert criterion_of(KTO(undesirable_weight=2.0), "text").keywords["undesirable_weight"] == 2.0


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "mapo"])
def test_every_loss_has_a_default_beta_and_passes_the_checks(name) -> None:
    method = KTO(name) if name in UNPAIRED_LOSSES else DPO(name)
    check(run(method), "text")
    assert criterion_of(method, "text").beta == LOSSES[name].betas["text"].value


def test_methods_and_losses_name_the_same_divergences() -> None:
    assert get_args(Divergence) == tuple(DIVERGENCES)


# --- columns ---------------------------------------------------------------------------------

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def columns(method: Any, row: dict[str, Any]) -> None:
    check_labels(loss_of(method), Labels([7], [pair_label(PAIR | row)]))


def test_columns_that_mean_nothing_for_a_loss_are_refused() -> None:
    for name in ("aot", "apo_zero"):
        for column in ("p_chosen", "margin"):
            field = {"margin": "target_margin"}.get(column, column)
            if field not in PREFERENCE_LOSSES[name].refuses:
                columns(DPO(name), {column: 0.9})
                continue
            with pytest.raises(ConfigError, match=f"{name!r} does not take .* {column!r}.*row 7 "):
                columns(DPO(name), {column: 0.9})
    columns(DPO("aot"), {"p_chosen": None})


def test_columns_that_a_loss_needs_are_asked_for() -> None:
    with pytest.raises(DataError, match=r"'odpo' needs the column 'score_chosen', and row 7 "):
        columns(DPO("odpo"), {})
    columns(DPO("odpo"), {"score_chosen": 2.0, "score_rejected": 1.0})
    with pytest.raises(DataError, match="needs the column 'score_chosen'"):
        from tests.builders import pair_rows, tiny_lm, tiny_tokenizer

        align((tiny_lm(), tiny_tokenizer()), DPO("odpo"), pair_rows(4))


# --- files -----------------------------------------------------------------------------------

WRITTEN = [
    DPO(
        {"sigmoid": 0.8, "robust": 0.2},
        0.3,
        divergence="alpha",
        divergence_alpha=0.25,
        weighting="wpo",
        ld_alpha=0.5,
        anchor=1.0,
        label_smoothing=0.2,
    ),
    DPO("best_of_k"),
    DPO("mapo", timestep_weighting="min_snr", safeguard=0.6, snr_scale=0.4),
    KTO("bco", 0.2, desirable_weight=1.5, undesirable_weight=0.5, momentum=0.8),
]


@pytest.mark.parametrize("method", WRITTEN, ids=str)
def test_a_method_reads_back_from_its_file(method) -> None:
    mapping = to_mapping(run(method))
    again = from_mapping(yaml.safe_load(yaml.safe_dump(mapping)))
    assert again.method == method and to_mapping(again) == mapping


def test_options_in_a_file_are_read_by_their_type_or_refused() -> None:
    def read(**method: Any) -> Any:
        return from_mapping({"policy": "p", "data": "d", "method": method}).method

    assert read(name="kto", desirable_weight="1e0").desirable_weight == 1.0
    assert read(name="dpo", loss={"sigmoid": 1, "hinge": "5e-1"}).loss["hinge"] == 0.5
    with pytest.raises(ConfigError, match=r"method\.divergence must be 'reverse_kl' or"):
        read(name="dpo", divergence="forward")
    with pytest.raises(ConfigError, match=r"method\.ld_alpha must be a number or null"):
        read(name="dpo", ld_alpha="much")
    with pytest.raises(ConfigError, match=r"method\.loss\.sigmoid must be a number"):
        read(name="dpo", loss={"sigmoid": "x"})
