"""References that are options: a moving average, a periodic copy, another adapter, a table."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit import (
    DPO,
    KTO,
    AdapterReference,
    ConfigError,
    DataError,
    EMAReference,
    LoRA,
    PrecomputedReference,
    SyncedReference,
    TextOptions,
    TrainerOptions,
    build,
    precompute_reference,
)
from alignkit.reference import MovingReference
from alignkit.runtime import Runtime
from tests.builders import TableBackend, move, pair_rows, text_wing, tiny_lm, tiny_tokenizer
from tests.test_reference import FEW, make_batch, reference_of, totals

pytestmark = pytest.mark.filterwarnings(
    # diffusers 0.42 gives a tensor to numpy's array functions.
    "ignore:__array__ implementation:DeprecationWarning"
)


def text_policy() -> Any:
    return tiny_lm("llama"), tiny_tokenizer()


def image_policy() -> Any:
    from tests.image.conftest import make_pipeline

    return make_pipeline()


def image_rows() -> list[dict[str, Any]]:
    from tests.image.conftest import picture

    return [
        {"prompt": "a red circle", "chosen": picture(2 * i), "rejected": picture(2 * i + 1)}
        for i in range(4)
    ]


WINGS: dict[str, Any] = {"text": (text_policy, pair_rows), "image": (image_policy, image_rows)}


@pytest.mark.parametrize("mix", [0.1, 0.5, 1.0])
def test_the_gap_to_a_policy_that_stands_still_shrinks_by_a_fixed_factor(mix) -> None:
    """After k moves: reference - policy = (1 - mix)^k (start - policy)."""
    backend = TableBackend(torch.linspace(-12, -8, 6))
    reference = MovingReference(backend, every=1, mix=mix)
    reference.prepare(Runtime())
    start = reference.snapshot["logps"].clone()
    with torch.no_grad():
        backend.module.logps += torch.tensor([3.0, -2, 0, 1, 5, -4])
    policy = backend.module.logps.detach()
    for k in range(1, 6):
        reference.update(k)
        expected = (1 - mix) ** k * (start - policy)
        torch.testing.assert_close(
            reference.snapshot["logps"] - policy, expected, rtol=1e-5, atol=1e-6
        )
    if mix == 1:
        assert torch.equal(reference.snapshot["logps"], policy)


def trained(run: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in run.trainer.parameters.items()}


def run_of(wing: str, reference: Any, **more: Any) -> Any:
    policy, rows = WINGS[wing]
    beta = 0.1 if wing == "text" else 10.0
    return build(policy(), DPO(beta=beta), rows(), reference=reference, **more)


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("adapter", [None, LoRA(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize(
    "option",
    [EMAReference(0.8), EMAReference(0.5, every=2), SyncedReference(2), SyncedReference(2, 0.25)],
    ids=str,
)
def test_a_moving_reference_is_the_average_of_the_trained_tensors(wing, adapter, option) -> None:
    run = run_of(wing, option, adapter=adapter, trainer=FEW)
    every = option.every
    mix = 1 - option.decay if isinstance(option, EMAReference) else option.mix
    # Float64 and from the definition: what the tensors of the reference must be.
    expected = {n: p.double() for n, p in trained(run).items()}
    for record in run.steps():
        if record.step % every == 0:
            expected = {
                n: (1 - mix) * expected[n] + mix * p.double() for n, p in trained(run).items()
            }
    reference = reference_of(run)
    assert {f"policy.{n}" for n in reference.snapshot} == expected.keys()
    for name, value in reference.snapshot.items():
        torch.testing.assert_close(value.double(), expected[f"policy.{name}"], rtol=1e-5, atol=1e-7)
    if wing == "text":
        # The reference's numbers are those of a policy that has these tensors.
        batch, before = make_batch(run.wing), trained(run)
        found = totals(reference, batch)
        assert all(torch.equal(p, before[n]) for n, p in trained(run).items())
        with torch.no_grad():
            for name, parameter in run.trainer.parameters.items():
                parameter.copy_(expected[name].float())
            wanted = run.wing.backend.module(batch).total
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("wing", WINGS)
def test_a_moving_reference_resumes_bit_exactly(wing, tmp_path) -> None:
    options = TrainerOptions(
        max_steps=4, batch_size=4, learning_rate=1e-2, warmup=0, save_every=1, log_every=1
    )
    arguments: dict[str, Any] = {"adapter": LoRA(rank=4), "trainer": options}
    whole = run_of(wing, EMAReference(0.7), run_dir=tmp_path / "whole", **arguments)
    lines = [record.as_dict() | {"seconds": 0} for record in whole.steps()]
    arguments["run_dir"] = tmp_path / "resumed"
    first = run_of(wing, EMAReference(0.7), **arguments)
    for record in first.steps():
        if record.step == 2:
            break
    first.folder.unlock()
    second = run_of(wing, EMAReference(0.7), **arguments)
    for _ in second.steps():
        pass
    assert second.trainer.step == 4
    assert [line | {"seconds": 0} for line in second.history] == lines
    for name, tensor in trained(whole).items():
        assert torch.equal(tensor, trained(second)[name]), name
    kept, again = reference_of(whole).snapshot, reference_of(second).snapshot
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    for run in (whole, second):
        run.folder.unlock()


def with_two_adapters() -> Any:
    """A PeftModel whose adapter `default` is active, with `other` beside it; both do something."""
    wing = text_wing("llama", LoRA(rank=4))
    wing.policy.add_adapter("other", wing.policy.peft_config["default"])
    move(wing.backend.module)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(3)
        for name, parameter in wing.policy.named_parameters():
            if ".other." in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return wing


@pytest.mark.parametrize("source", ["in hand", "folder"])
def test_another_adapter_of_the_policy_as_reference(source, tmp_path) -> None:
    from peft import PeftModel

    wing = with_two_adapters()
    base = tiny_lm("llama")
    base.save_pretrained(tmp_path / "base")
    wing.policy.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    wing.policy.peft_config["other"].base_model_name_or_path = str(tmp_path / "base")
    wing.save(tmp_path / "adapters")
    batch = make_batch(wing)
    alone = PeftModel.from_pretrained(base, tmp_path / "adapters" / "other")
    with torch.no_grad():
        of_default = wing.backend.module(batch).total
        expected = text_wing().backend.module.__class__(alone)(batch).total
    assert not torch.allclose(of_default, expected, atol=1e-2)
    policy = (wing.policy, wing.tokenizer) if source == "in hand" else str(tmp_path / "adapters")
    run = build(policy, DPO(), pair_rows(8), reference=AdapterReference("other"), trainer=FEW)
    assert "adapter other" in run.facts["method"]["reference"]
    assert not [name for name in run.trainer.parameters if ".other." in name]
    start = trained(run)
    for _ in range(2):
        assert torch.equal(totals(reference_of(run), batch), expected)
        with torch.no_grad():
            now = run.wing.backend.module(batch).total
        for _ in run.steps():
            pass
    assert not torch.equal(now, of_default)
    assert any(not torch.equal(p, start[n]) for n, p in trained(run).items())


def test_another_adapter_of_a_pipeline_as_reference() -> None:
    from alignkit_diffusion.lora import add_adapter, train_only_adapter

    pipe = image_policy()
    add_adapter(pipe.unet, LoRA(rank=2), seed=0)
    with warnings.catch_warnings():  # peft says that there will be two
        warnings.simplefilter("ignore")
        pipe.unet.add_adapter(pipe.unet.peft_config["default"], adapter_name="other")
    pipe.unet.set_adapter("default")
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if ".lora_B.other." in name:
                parameter += 0.05
    run = build(
        pipe, DPO(beta=10.0), image_rows(), reference=AdapterReference("other"), trainer=FEW
    )
    assert run.trainer.parameters
    assert not [name for name in run.trainer.parameters if ".other." in name]
    examples = run.trainer.source.examples
    batch = examples.collate(range(2), [0, 0])
    draw = run.wing.backend.draw(batch, (0, 1))
    with torch.no_grad():
        found = reference_of(run).log_likelihood(batch, draw, frozenset()).total
        assert not torch.equal(run.wing.backend.module(batch, draw).total, found)
    assert len(list(run.steps())) == 3
    pipe.unet.set_adapter("other")
    with torch.no_grad():
        assert torch.equal(run.wing.backend.module(batch, draw).total, found)
    train_only_adapter(pipe.unet)
    assert {n for n, p in pipe.unet.named_parameters() if p.requires_grad} == {
        n for n, _ in pipe.unet.named_parameters() if ".lora_" in n and ".other." in n
    }


def test_the_trained_adapter_is_no_reference() -> None:
    wing = with_two_adapters()
    policy = (wing.policy, wing.tokenizer)
    with pytest.raises(ConfigError, match="names the adapter that is trained"):
        build(policy, DPO(), pair_rows(8), reference=AdapterReference("default"), trainer=FEW)


@pytest.mark.parametrize("as_file", [False, True])
def test_a_table_of_the_reference_s_numbers_stands_for_it(as_file, tmp_path) -> None:
    out = tmp_path / "table.jsonl"
    table = precompute_reference(text_policy(), pair_rows(8), out=out)
    assert list(table) != [] and all(len(values) == 2 for values in table.values())
    assert [json.loads(line)["row"] for line in out.read_text().splitlines()] == list(range(8))
    option = PrecomputedReference(str(out) if as_file else table)
    mine = build(text_policy(), DPO(), pair_rows(8), reference=option, trainer=FEW)
    theirs = build(text_policy(), DPO(), pair_rows(8), reference="frozen", trainer=FEW)
    assert "precomputed (8 rows)" in mine.facts["method"]["reference"]
    for record, other in zip(mine.steps(), theirs.steps(), strict=True):
        assert record.loss == pytest.approx(other.loss, abs=1e-5)
        assert record.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)


def test_a_table_serves_rankings_too() -> None:
    from tests.test_every_loss_text import group_rows

    method, rows = DPO("plackett_luce"), group_rows(8)
    table = precompute_reference(text_policy(), rows, kind="groups")
    assert {len(values) for values in table.values()} == {2, 3, 4}
    options = (PrecomputedReference(table), "frozen")
    mine, theirs = (
        list(build(text_policy(), method, rows, reference=option, trainer=FEW).steps())
        for option in options
    )
    for record, other in zip(mine, theirs, strict=True):
        assert record.loss == pytest.approx(other.loss, abs=1e-5)


@pytest.mark.parametrize("kind", ["pairs", "unpaired"])
def test_a_table_serves_pairs_that_are_read_as_single_answers(kind) -> None:
    method, rows = KTO(loss="bco"), pair_rows(8)
    # Padded and sorted by length, where the pass takes answers in another order than the rows.
    options = TextOptions(packing="bucket")
    table = precompute_reference(text_policy(), rows, kind=kind, data_options=options)
    references = (PrecomputedReference(table), "frozen")
    mine, theirs = (
        list(build(text_policy(), method, rows, reference=one, trainer=FEW).steps())
        for one in references
    )
    for record, other in zip(mine, theirs, strict=True):
        assert record.loss == pytest.approx(other.loss, abs=1e-5)
        assert record.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)


def test_a_table_without_a_row_of_the_data_is_refused() -> None:
    table = {row: [-1.0, -2.0] for row in range(7)}
    run = build(
        text_policy(), DPO(), pair_rows(8), reference=PrecomputedReference(table), trainer=FEW
    )
    with pytest.raises(DataError, match="row 7 has 2 answers, and the table has nothing for it"):
        list(run.steps())


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "table.jsonl"
    file.write_text('{"row": 0}\n')
    with pytest.raises(DataError, match=r"columns row \(a number\) and logps"):
        build(text_policy(), DPO(), pair_rows(4), reference=PrecomputedReference(file))


def test_only_language_models_have_their_numbers_computed_in_advance() -> None:
    with pytest.raises(ConfigError, match="for language models only"):
        precompute_reference(image_policy(), image_rows())
