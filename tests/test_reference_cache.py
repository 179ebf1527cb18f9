"""The numbers of a reference on disk: found by what they depend on, and by nothing else."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import alignkit.reference_cache as cache
from alignkit import (
    DPO,
    KTO,
    AdapterReference,
    CachedReference,
    ConfigError,
    DataError,
    EMAReference,
    GenerationOptions,
    LoRA,
    PrecomputedReference,
    SyncedReference,
    TextOptions,
    TrainerOptions,
    build,
    cache_reference,
)
from alignkit.identity import weights_digest
from alignkit.reference import FrozenModel
from alignkit.reference_cache import StoredReference
from alignkit.reference_store import MANY, ReferenceStore, Table, as_keys
from alignkit.text.content import TextContent
from alignkit.text.likelihood import TextLikelihood
from tests.builders import move, pair_rows, text_wing, tiny_lm, tiny_tokenizer
from tests.distributed.launch import environment
from tests.test_every_loss_text import group_rows
from tests.test_reference import FEW, reference_of

SHORT = GenerationOptions(max_new_tokens=1)
THREE = TrainerOptions(max_steps=3, batch_size=4, learning_rate=1e-3, warmup=0, log_every=1)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


@pytest.fixture
def forwards(monkeypatch) -> Iterator[list[int]]:
    """How many answers any model evaluated without gradient, as a reference does."""
    counted = [0]
    forward = TextLikelihood.forward

    def want(draw: Any = None, want: Any = ()) -> Any:
        return want

    def counting(self: Any, batch: Any, *arguments: Any, **named: Any) -> Any:
        # A check of the packed layout, on a sample of its own, asks for tokens.
        if not torch.is_grad_enabled() and "token_logps" not in {*want(*arguments, **named)}:
            counted[0] += batch.num_answers
        return forward(self, batch, *arguments, **named)

    monkeypatch.setattr(TextLikelihood, "forward", counting)
    yield counted


def policy(architecture: str = "llama") -> Any:
    return tiny_lm(architecture), tiny_tokenizer()


def losses(reference: Any, method: Any = None, rows: Any = None, **more: Any) -> list[float]:
    more = {"trainer": THREE, **more}
    given = more.pop("policy", None) or policy()
    run = build(given, method or DPO(beta=0.1), rows or pair_rows(9), reference=reference, **more)
    return [record.loss for record in run.steps()]


def close(values: list[float]) -> Any:
    return pytest.approx(values, abs=1e-5)


# --- what it is worth ----------------------------------------------------------------------------


def test_a_second_run_evaluates_no_reference_and_holds_none(forwards, monkeypatch) -> None:
    plain = losses("frozen")
    forwards[0] = 0
    assert losses(CachedReference()) == close(plain)
    # Three steps of 4 see all of the 9 pairs, each of them once.
    assert forwards == [18]
    monkeypatch.setattr(FrozenModel, "copy_of", None)  # nor is there a second model in a first run
    forwards[0] = 0
    for changed in (
        {"trainer": replace(THREE, learning_rate=3e-3)},
        {"trainer": replace(THREE, batch_size=3, micro_batch=1)},
        {"method": DPO(beta=0.3)},
        {"method": DPO("ipo")},
        {"method": DPO(weighting="wpo")},
        {"seed": 5},
        {"data_options": TextOptions(packing="none")},
        {"rows": list(reversed(pair_rows(9)))},
        {"adapter": LoRA(rank=4)},  # the base under a fresh adapter is the same model
        {"adapter": LoRA(rank=2, kind="dora")},
        {"eval_data": pair_rows(5), "trainer": replace(THREE, eval_every=1)},
    ):
        options = {"reference": CachedReference(), **changed}
        run_losses = losses(options.pop("reference"), **options)
        assert all(map(math.isfinite, run_losses))
        evaluated = 3 * 10 if "eval_data" in changed else 0  # the policy, on held-out rows
        assert forwards == [evaluated], changed
        forwards[0] = 0


def test_equal_weights_give_margin_0_where_the_layout_is_the_policy_s(folder) -> None:
    """Computed with the policy's own micro-batches: exactly; ahead, in another layout: 1e-5."""
    exact = CachedReference(ahead=False)
    order = {"trainer": replace(THREE, micro_batch=2)}
    for _ in range(2):  # made, and then found
        run = build(policy(), DPO(), pair_rows(9), reference=exact, **order)
        first = next(run.steps())
        assert first.loss == torch.tensor(math.log(2)).item()
        assert first.metrics["rewards/margins"] == 0
    run = build(policy(), DPO(), pair_rows(9), reference=CachedReference(folder=folder / "b"))
    first = next(run.steps())
    assert first.loss == pytest.approx(math.log(2), abs=1e-5)
    assert first.metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("loss", ["kto", "plackett_luce", "ld"])
def test_single_answers_rankings_and_parts_of_answers_are_kept_too(loss, ahead, forwards) -> None:
    singles = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0}
        for i, row in enumerate(pair_rows(9))
    ]
    method, rows = {
        "kto": (KTO(), singles),
        "plackett_luce": (DPO("plackett_luce"), group_rows(9)),
        "ld": (DPO(ld_alpha=0.3), pair_rows(9)),
    }[loss]
    plain = losses("frozen", method, rows)
    assert losses(CachedReference(ahead=ahead), method, rows) == close(plain)
    forwards[0] = 0
    again = {"ld": DPO("ipo", ld_alpha=0.8), "kto": KTO("bco", beta=0.3)}.get(loss, method)
    losses(CachedReference(ahead=ahead), again, rows)
    assert forwards == [0]
    losses(CachedReference(ahead=ahead), method, rows)
    # Of mismatched answers, too: those that are left are the policy's own.
    assert forwards == [3 * 4 if loss == "kto" else 0]


@pytest.mark.parametrize("where", ["in hand", "folder"])
def test_another_model_is_not_even_loaded_when_all_is_known(where, tmp_path, monkeypatch) -> None:
    from alignkit.text import loading

    other: Any = tiny_lm("llama", seed=5), tiny_tokenizer()
    if where == "folder":
        for part in other:
            part.save_pretrained(tmp_path / "other")
        other = str(tmp_path / "other")
    plain = losses(other)
    assert losses(CachedReference(other)) == close(plain)
    if where == "folder":
        monkeypatch.setattr(loading, "load_whole", None)
    assert losses(CachedReference(other), trainer=replace(THREE, learning_rate=1e-4)) != plain
    if where == "folder":
        with pytest.raises(TypeError), monkeypatch.context() as patch:
            patch.setattr(cache, "CHUNK", 512)
            losses(CachedReference(other), rows=pair_rows(12))  # three rows more: it is needed


def test_a_changed_file_is_another_model(tmp_path) -> None:
    for part in (tiny_lm("llama", seed=5), tiny_tokenizer()):
        part.save_pretrained(tmp_path / "other")
    first = losses(CachedReference(str(tmp_path / "other")))
    tiny_lm("llama", seed=6).save_pretrained(tmp_path / "other")
    second = losses(CachedReference(str(tmp_path / "other")))
    assert second == close(losses(str(tmp_path / "other"))) and second != close(first)


def test_the_reference_of_a_continued_adapter_is_its_start(folder) -> None:
    wing = text_wing("llama", LoRA(rank=4))
    move(wing.backend.module)
    given = (wing.policy, wing.tokenizer)
    start = {name: p.detach().clone() for name, p in wing.policy.named_parameters()}
    first = losses(CachedReference(), policy=given)
    assert first[0] == pytest.approx(math.log(2), abs=1e-5)
    with torch.no_grad():
        for name, parameter in wing.policy.named_parameters():
            parameter.copy_(start[name])
    assert losses("auto", policy=given) == close(first)
    with torch.no_grad():
        for name, parameter in wing.policy.named_parameters():
            parameter.copy_(start[name])
    off = losses(CachedReference("adapter_off"), policy=given)
    assert off[0] != pytest.approx(math.log(2), abs=1e-3)
    assert len([one for one in folder.iterdir() if one.name != "models"]) == 2


def test_another_adapter_is_kept_by_its_own_tensors() -> None:
    from tests.test_moving_references import with_two_adapters

    for of in (AdapterReference("other"), CachedReference(AdapterReference("other"))):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            wing = with_two_adapters()
        found = losses(of, policy=(wing.policy, wing.tokenizer))
        if isinstance(of, AdapterReference):
            plain = found
    assert found == close(plain)


# --- the defects of a peer ------------------------------------------------------------------------


def test_defect_a_the_reference_is_the_model_in_hand_and_not_its_name(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    for part in policy():
        part.save_pretrained(tmp_path / "m")
    losses(CachedReference(), policy=str(tmp_path / "m"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    move(model)
    found = losses(CachedReference(), policy=(model, tiny_tokenizer()))
    assert found[0] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize(
    "changed",
    [
        {"data_options": TextOptions(max_length=30)},
        {"data_options": TextOptions(max_length=30, truncation="keep_end")},
        {"method": DPO(ld_alpha=0.5)},
        {"trainer": replace(THREE, precision="bf16")},
    ],
    ids=["max_length", "keep_end", "ld_alpha", "precision"],
)
def test_defect_b_what_changes_a_number_is_never_served_the_old_one(changed) -> None:
    rows = pair_rows(9, chat=False)
    losses(CachedReference(), rows=rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        found, plain = (losses(of, rows=rows, **changed) for of in (CachedReference(), "frozen"))
    rounding = 2e-2 if "trainer" in changed else 1e-5
    assert found == pytest.approx(plain, abs=rounding)


def test_defect_c_what_changes_no_number_costs_no_pass(forwards, tmp_path) -> None:
    given: dict[str, Any] = {"generation": SHORT, "trainer": THREE}
    losses(CachedReference(), **given, run_dir=tmp_path / "one")
    forwards[0] = 0
    given["trainer"] = replace(THREE, learning_rate=1e-5)
    losses(CachedReference(), **given, run_dir=tmp_path / "two")
    assert forwards == [0]


def test_defects_d_and_e_a_synced_reference_and_all_counters_go_on_after_a_resume(tmp_path) -> None:
    options = replace(THREE, max_steps=5, save_every=1)
    told = {}
    for name, stops in {"whole": (None,), "resumed": (3, None)}.items():
        for stop in stops:
            run = build(
                policy(), DPO(), pair_rows(9), reference=SyncedReference(2), trainer=options,
                run_dir=tmp_path / name, generation=SHORT,
            )  # fmt: skip
            for record in run.steps():
                if record.step == stop:
                    break
            run.folder.unlock()
        history = [line | {"seconds": 0} for line in run.history]
        told[name] = history, run.trainer.step, run.trainer.source.consumed
        assert run.seconds >= sum(line["seconds"] for line in run.history)
    assert told["resumed"] == told["whole"]
    assert [line["step"] for line in told["whole"][0]] == [1, 2, 3, 4, 5]


def test_a_resumed_run_needs_no_pass_and_ends_alike(forwards, tmp_path) -> None:
    options = replace(THREE, max_steps=4, save_every=1)
    told = {}
    for name, stops in {"whole": (None,), "resumed": (2, None)}.items():
        for stop in stops:
            forwards[0] = 0
            run = build(
                policy(), DPO(), pair_rows(9), reference=CachedReference(), trainer=options,
                run_dir=tmp_path / name, generation=SHORT,
            )  # fmt: skip
            for record in run.steps():
                if record.step == stop:
                    break
            run.folder.unlock()
        told[name] = [line["loss"] for line in run.history]
    assert told["resumed"] == told["whole"] and forwards == [0]


def test_a_pass_holds_a_window_of_the_rows_at_a_time(forwards, monkeypatch) -> None:
    """Streamed rows, repeated by a second epoch: each is computed once, window by window."""
    held = []
    compute = StoredReference._compute

    def watched(self: Any, groups: list[Any], *more: Any) -> None:
        held.append([group.longest for group in groups])
        compute(self, groups, *more)

    monkeypatch.setattr(StoredReference, "_compute", watched)
    monkeypatch.setattr("alignkit.reference_cache.WINDOW", 4)
    options = TextOptions(streaming=True, shuffle_buffer=5)
    trainer = TrainerOptions(max_steps=8, batch_size=2)
    given = {"reference": CachedReference(), "data_options": options, "trainer": trainer}
    found = cache_reference(policy(), DPO(), pair_rows(9), **given)
    assert found.computed == found.known == 18
    assert [len(one) for one in held] == [4, 4, 1]
    assert all(one == sorted(one, reverse=True) for one in held)


def test_a_pass_ahead_of_all_runs_is_what_they_find(forwards, tmp_path) -> None:
    from typer.testing import CliRunner

    from alignkit.cli import app

    for part in policy():
        part.save_pretrained(tmp_path / "m")
    data, file = tmp_path / "pairs.jsonl", tmp_path / "run.yaml"
    data.write_text("\n".join(map(json.dumps, pair_rows(9))))
    file.write_text(
        f"policy: {tmp_path / 'm'}\nmethod: ipo_like\ndata: {data}\nrun_dir: {tmp_path / 'run'}\n"
        "trainer: {save_every: 1}\n".replace("ipo_like", "{name: dpo, loss: ipo}")
    )

    def call(*arguments: Any) -> str:
        done = CliRunner().invoke(app, ["cache", "reference", *map(str, arguments)])
        return str(done.stdout) + str(done.stderr)

    assert "computed: 18 answers\nkept: 18 numbers in" in call(tmp_path / "m", data)
    assert forwards == [18]
    assert "computed: 0 answers" in call(file, "seed=3")
    assert "computed: 0 answers" in call(tmp_path / "m", data, "adapter.rank=4", "method.beta=0.3")
    assert losses(CachedReference(), policy=str(tmp_path / "m")) and forwards == [18]
    assert "computed: 18 answers" in call(file, "--folder", tmp_path / "elsewhere")
    shorter = ("data_options.max_length=45", "data_options.on_bad_row=skip")
    cut = call(tmp_path / "m", data, *shorter)
    assert "computed: " in cut and "computed: 0" not in cut and "computed: 18" not in cut
    assert "the data must be given" in call(tmp_path / "m", "seed=3")
    assert "uses no reference" in call(file, "method.loss=simpo")
    assert not (tmp_path / "run").exists()


# --- the disk ------------------------------------------------------------------------------------


def test_a_pass_that_is_stopped_goes_on_where_it_was(forwards, monkeypatch) -> None:
    monkeypatch.setattr(cache, "CHUNK", 2)
    monkeypatch.setattr(cache, "SECONDS", -1.0)
    evaluate, calls = cache.StoredReference._evaluate, []

    def stopping(self: Any, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        evaluate(self, *arguments)

    monkeypatch.setattr(cache.StoredReference, "_evaluate", stopping)
    with pytest.raises(KeyboardInterrupt):
        losses(CachedReference())
    assert forwards == [12]
    plain = losses(CachedReference())
    assert forwards == [18]
    assert plain == close(losses("frozen"))


KILLED = """
import os, signal
import alignkit.atomic, alignkit.reference_cache as cache
from tests.test_reference_cache import CachedReference, losses
cache.CHUNK, cache.SECONDS = 2, -1.0
replace, calls = os.replace, []
def killing(*names):
    calls.append(names)
    if len(calls) == 4:  # about.json, two shards, and in the middle of the third
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)
alignkit.atomic.os.replace = killing
losses(CachedReference())
"""


@pytest.mark.slow
def test_a_killed_pass_leaves_whole_shards_and_goes_on(forwards, folder, tmp_path) -> None:
    given = environment() | {"ALIGNKIT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", KILLED], env=given, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    found = losses(CachedReference())
    assert forwards == [18 - 8]
    assert found == close(losses("frozen"))


def numbered(first: int, num: int) -> tuple[np.ndarray, np.ndarray]:
    names = [i.to_bytes(16, "little") for i in range(first, first + num)]
    return as_keys(names), np.arange(first, first + num, dtype=np.float32)


def test_many_writers_share_a_folder_and_many_shards_become_one(tmp_path) -> None:
    one, two = (ReferenceStore(tmp_path, {"weights": "x"}) for _ in range(2))
    for i in range(MANY // 2 + 1):
        one.write(*numbered(10 * i, 10))
        two.write(*numbered(10 * i + 5, 10))  # half of it is what the other has, too
    for store in (one, two):
        table = Table()
        table.add(*store.read())
        assert len(table) == 10 * (MANY // 2 + 1) + 5
        values = (table.get(i.to_bytes(16, "little")) for i in range(len(table)))
        assert list(values) == list(range(len(table)))
        assert table.get(b"x" * 16) is None
    assert len(list(one.folder.glob("*.safetensors"))) == 1
    assert json.loads((one.folder / "about.json").read_text()) == {"weights": "x"}
    assert ReferenceStore(tmp_path, {"weights": "y"}).folder != one.folder


def test_a_damaged_shard_is_passed_over_with_a_word(tmp_path, caplog) -> None:
    store = ReferenceStore(tmp_path, {})
    whole, damaged = store.write(*numbered(0, 3)), store.write(*numbered(3, 3))
    raw = bytearray(damaged.read_bytes())
    raw[-1] ^= 1
    damaged.write_bytes(bytes(raw))
    (store.folder / "0bad.safetensors").write_bytes(whole.read_bytes()[:40])
    keys, values = store.read()
    assert values.tolist() == [0, 1, 2] and len(keys) == 3
    assert caplog.text.count("is damaged; it is passed over") == 2


def test_a_table_takes_few_and_many() -> None:
    table = Table()
    for first, num in [(0, 100), (50, 5), (100, 3), (90, 40), (1000, 1)]:
        table.add(*numbered(first, num))
    assert len(table) == 131
    assert all(table.get(i.to_bytes(16, "little")) == i for i in (*range(130), 1000))
    table.add(as_keys([(7).to_bytes(16, "little")]), np.array([70.0]))
    assert table.get((7).to_bytes(16, "little")) == 7


# --- keys ----------------------------------------------------------------------------------------


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def test_a_key_holds_ids_boundary_and_counted_tokens_and_nothing_else() -> None:
    def key(prompt: Any, answer: Any, scored: Any = None, what: str = "total") -> bytes:
        mask = None if scored is None else (np.array(scored, dtype=bool),)
        return TextContent((prompt,), (answer,), (0,), mask).keys([0], what)[0]

    same = key(ids(1, 2), ids(3, 4))
    assert key(ids(1, 2), ids(3, 4), [True, True]) == same
    others = [
        key(ids(1, 2, 3), ids(4)),
        key(ids(1), ids(2, 3, 4)),
        key(ids(1, 2), ids(4, 3)),
        key(ids(1, 2), ids(3, 4), [True, False]),
        key(ids(1, 2), ids(3, 4), [False, True]),
        key(ids(1, 2), ids(3, 4), what="public"),
    ]
    assert len({same, *others}) == 7
    # The place in a batch, and who else is in it, are nothing to it.
    both = TextContent((ids(9), ids(1, 2)), (ids(5, 6, 7), ids(3, 4)), (0, 1))
    assert both.keys([0, 1], "total")[1] == same
    # A pair's public part ends where its shorter answer does.
    pair = TextContent((ids(1, 2),), (ids(3, 4), ids(5)), (0, 0))
    assert pair.keys([0, 0], "total")[0] == same
    assert pair.keys([0, 0], "public")[0] != key(ids(1, 2), ids(3, 4), what="public")
    # A field that is new must be in the key, or be said here to change no likelihood.
    known = {"prompts", "completions", "owner", "scored"} | {"layout"}
    assert {field.name for field in fields(TextContent)} == known


def test_joined_contents_are_their_parts() -> None:
    a = TextContent((ids(1),), (ids(2), ids(3)), (0, 0))
    b = TextContent(
        (ids(4), ids(5)), (ids(6, 7), ids(8)), (0, 1), (np.ones(2, bool), np.zeros(1, bool))
    )
    both = TextContent.joined([a, b])
    assert both.owner == (0, 0, 1, 2) and both.lengths() == [2, 2, 3, 2]
    assert both.keys([0, 0, 1, 2], "total") == [*a.keys([0, 0], "total"), *b.keys([0, 1], "total")]


def test_weights_count_by_name_dtype_shape_and_every_byte() -> None:
    weight = {"a": torch.arange(6.0), "b": torch.ones(2)}
    same = weights_digest(weight)
    assert weights_digest({"b": torch.ones(2), "a": torch.arange(12.0)[::2] / 2}) == same
    others = [
        {"a": torch.arange(6.0)},
        {"c": weight["a"], "b": weight["b"]},
        {"a": weight["a"].reshape(2, 3), "b": weight["b"]},
        {"a": weight["a"].bfloat16(), "b": weight["b"]},
        {"a": weight["a"] + torch.tensor([0, 0, 0, 0, 0, 1e-6]), "b": weight["b"]},
    ]
    assert len({same, *map(weights_digest, others)}) == 6


# --- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "of", [EMAReference(0.9), SyncedReference(2), PrecomputedReference({}), "none", None]
)
def test_what_moves_or_has_its_numbers_is_not_cached(of) -> None:
    with pytest.raises(ConfigError, match=r"reference\.of"):
        CachedReference(of)


def test_images_have_no_cached_reference() -> None:
    from alignkit.config import RunConfig, check

    config = RunConfig("x", DPO(), "y", reference=CachedReference())
    with pytest.raises(ConfigError, match="A cached reference is for text policies"):
        check(config, "image")


def test_a_row_that_was_not_expected_is_refused() -> None:
    run = build(policy(), DPO(), pair_rows(4), reference=CachedReference(), trainer=FEW)
    strange = build(policy(), DPO(), pair_rows(8), trainer=FEW).trainer.source.examples
    batch = strange.collate([7], [0])
    with pytest.raises(DataError, match=r"row \[7\] holds an answer that was not among them"):
        reference_of(run).log_likelihood(batch, None, frozenset())
