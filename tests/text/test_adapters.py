"""Adapters end to end: what is saved, merged, continued and loaded in 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from alignkit import (
    DPO,
    ConfigError,
    GenerationOptions,
    LoRA,
    TrainerOptions,
    align,
    build,
    export_merged,
)
from alignkit.checks import trainer as checks
from alignkit.cli import app
from alignkit.config import RunConfig, check
from alignkit.text.wing import build as build_text
from tests.builders import move, pair_rows, tiny_lm, tiny_tokenizer

FEW = TrainerOptions(max_steps=2, batch_size=4, learning_rate=1e-2, warmup=0)
IDS = torch.arange(4, 24).reshape(2, 10)


def saved_base(folder: Path, architecture: str = "llama") -> str:
    for part in (tiny_lm(architecture), tiny_tokenizer()):
        part.save_pretrained(folder / "base")
    return str(folder / "base")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


def test_dora_refuses_weights_with_rows_of_zero_and_leaves_the_model_as_it_was() -> None:
    model = tiny_lm("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3] = 0
    names = list(dict(model.named_parameters()))
    with pytest.raises(ConfigError, match=r"rows that are all 0: model\.layers\.0\.self_attn\.q_"):
        build_text(
            (model, tiny_tokenizer()),
            adapter=LoRA(rank=2, kind="dora"),
            device=torch.device("cpu"),
            precision="fp32",
            gradient_checkpointing=False,
            seed=0,
        )
    assert list(dict(model.named_parameters())) == names


def written_out(before: Tensor, state: dict[str, Tensor], name: str, kind: str) -> Tensor:
    """The merged weight by each paper's equation, in float64; rank 4, alpha 8."""
    a, b = (state[f"{name}.lora_{side}.weight"].double() for side in "AB")
    scale = {"lora": 8 / 4, "dora": 8 / 4, "rslora": 8 / 4**0.5}[kind]
    moved = before.double() + scale * b @ a
    if kind != "dora":
        return moved
    # 2402.09353 Eq. 5: magnitudes of the rows times directions.
    magnitude = state[f"{name}.lora_magnitude_vector"].double()
    return magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_what_was_trained_is_what_is_saved_loaded_and_merged(kind, tmp_path) -> None:
    from safetensors.torch import load_file

    base = saved_base(tmp_path)
    wing = build_text(base, adapter=LoRA(rank=4, alpha=8, kind=kind))
    names = {n.split(".lora_A")[0] for n, _ in wing.policy.named_parameters() if "lora_A" in n}
    ends = {name.rsplit(".", 1)[-1] for name in names}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    move(wing.backend.module)
    trained = logits(wing.policy)
    assert not torch.allclose(trained, logits(tiny_lm("llama")), atol=1e-2)
    wing.save(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    )
    assert torch.equal(logits(loaded), trained)
    out = export_merged(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert not isinstance(merged, PeftModel)
    torch.testing.assert_close(logits(merged), trained, rtol=1e-5, atol=1e-5)
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    before = tiny_lm("llama").get_parameter(f"{name}.weight").detach()
    expected = written_out(before, state, f"base_model.model.{name}", kind)
    found = merged.get_parameter(f"{name}.weight").double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_transposed_layers_and_half_precision_are_merged_too(tmp_path) -> None:
    base = saved_base(tmp_path, "gpt2")
    tiny_lm("gpt2").bfloat16().save_pretrained(base)
    wing = build_text(base, adapter=LoRA(rank=4))
    move(wing.backend.module)
    wing.save(tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(
        export_merged(tmp_path / "adapter", tmp_path / "out")
    )
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(logits(merged.float()), logits(wing.policy), rtol=0.05, atol=0.02)


def test_a_run_is_exported_from_the_command_line(tmp_path) -> None:
    base, run = saved_base(tmp_path), tmp_path / "run"
    result = align(
        base,
        DPO(),
        pair_rows(8),
        adapter=LoRA(rank=4),
        trainer=FEW,
        run_dir=run,
        generation=GenerationOptions(max_new_tokens=1),
    )
    done = CliRunner().invoke(app, ["export", str(run), "--merged", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(result.model), rtol=1e-5, atol=1e-5)
    again = CliRunner().invoke(app, ["export", str(run), "--merged", str(tmp_path / "out")])
    assert again.exit_code == 2 and "is there already" in again.output


def test_nonsense_is_not_exported(tmp_path) -> None:
    base = saved_base(tmp_path)
    with pytest.raises(ConfigError, match="a whole model already"):
        export_merged(base, tmp_path / "out")
    wing = build_text((tiny_lm("llama"), tiny_tokenizer()), adapter=LoRA(rank=4))
    wing.save(tmp_path / "nameless")
    with pytest.raises(ConfigError, match="Give it with --base"):
        export_merged(tmp_path / "nameless", tmp_path / "out")
    other = saved_base(tmp_path / "other", "gpt2")
    with pytest.raises(ConfigError, match="cannot be merged into"):
        export_merged(tmp_path / "nameless", tmp_path / "out", base=other)
    assert not (tmp_path / "out").exists()
    assert export_merged(tmp_path / "nameless", tmp_path / "out", base=base).is_dir()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_on_a_tied_head_is_not_merged(tmp_path) -> None:
    from peft import LoraConfig, get_peft_model

    base = saved_base(tmp_path, "qwen2")
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(ConfigError, match="one tensor in this model"):
        export_merged(tmp_path / "adapter", tmp_path / "out")


def test_resuming_puts_weights_back_into_the_same_adapter(tmp_path) -> None:
    base = saved_base(tmp_path)
    given: dict[str, Any] = {
        "adapter": LoRA(rank=4, kind="dora"),
        "trainer": TrainerOptions(
            max_steps=4, batch_size=4, learning_rate=1e-2, warmup=0, save_every=1
        ),
        "run_dir": tmp_path / "run",
        "generation": GenerationOptions(max_new_tokens=1),
    }
    first = build(base, DPO(), pair_rows(8), **given)
    for record in first.steps():
        if record.step == 2:
            break
    first.folder.unlock()
    left = {name: p.detach().clone() for name, p in first.trainer.parameters.items()}
    second = build(base, DPO(), pair_rows(8), **given)
    assert list(second.wing.policy.peft_config) == ["default"]
    assert second.trainer.parameters.keys() == left.keys()
    assert all(torch.equal(p, left[name]) for name, p in second.trainer.parameters.items())
    assert second.wing.trained_adapters() == ["default"]
    second.folder.unlock()


# --- 4 bits --------------------------------------------------------------------------------------


def test_a_base_in_4_bits_is_loaded_as_qlora_says(tmp_path, monkeypatch) -> None:
    """A conformance test: what transformers is told, and that nothing moves or casts the result."""
    base = saved_base(tmp_path)
    told: dict[str, Any] = {}

    def load(name: str, **options: Any) -> Any:
        told.update(options, name=name)
        model = tiny_lm("llama").bfloat16()
        model.is_quantized = True
        return model, {"missing_keys": []}

    def stay(*_: Any, **__: Any) -> None:
        raise AssertionError("quantised weights are moved or cast by their loader only")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with monkeypatch.context() as patch:
        patch.setattr("peft.PeftModel.to", stay)
        wing = build_text(base, adapter=LoRA(rank=4, quantization="4bit"), precision="bf16")
    config = told["quantization_config"]
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16 == told["dtype"]
    assert told["device_map"] == {"": torch.device("cpu")} and told["name"] == base
    assert told["use_safetensors"] and not told["trust_remote_code"]
    dtypes = {p.requires_grad: p.dtype for p in wing.policy.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


@pytest.mark.parametrize(
    ("modality", "options", "cuda", "why"),
    [
        ("text", {}, False, "needs a CUDA GPU, and this machine has none"),
        ("text", {}, True, r"pip install 'alignkit\[quantization\]'"),
        ("text", {"sharding": "fsdp2"}, True, "which are not sharded"),
        ("image", {}, True, "for language models"),
    ],
)
def test_where_4_bits_cannot_be_they_are_refused(modality, options, cuda, why, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    config = RunConfig(
        "policy",
        DPO(),
        "data.jsonl",
        adapter=LoRA(quantization="4bit"),
        trainer=TrainerOptions(**options),
    )
    with pytest.raises(ConfigError, match=why):
        check(config, modality)


def test_a_model_in_hand_is_not_quantised_after_the_fact() -> None:
    with pytest.raises(ConfigError, match="this policy is in hand already"):
        build_text((tiny_lm(), tiny_tokenizer()), adapter=LoRA(quantization="4bit"))


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP"])
def test_engines_that_own_the_update_are_refused(engine, monkeypatch) -> None:
    from alignkit.runtime import Runtime

    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ConfigError, match="sharding='fsdp2' or 'zero3', which shard"):
        Runtime()
