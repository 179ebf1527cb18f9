"""Adapters: which layers, what trains, files that other tools read back, and going on from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.options import LoRA
from alignkit_diffusion import build
from alignkit_diffusion.kohya import kohya_state
from alignkit_diffusion.lora import DIFFUSERS_FILE, KOHYA_FILE, resolve_targets
from tests.image.conftest import BUILD, make_pipeline


def wing_with(**adapter: Any) -> Any:
    return build(make_pipeline(), adapter=LoRA(**adapter), **BUILD)


def move(wing: Any) -> None:
    seeded = torch.Generator().manual_seed(1)
    for parameter in wing.policy.unet.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=seeded)


def prediction(unet: Any) -> Tensor:
    seeded = torch.Generator().manual_seed(2)
    added = {
        "text_embeds": torch.randn(2, 20, generator=seeded),
        "time_ids": torch.tensor([[32.0, 16, 0, 0, 16, 16]] * 2),
    }
    with torch.no_grad():
        return unet(
            torch.randn(2, 4, 8, 8, generator=seeded),
            torch.tensor([10, 500]),
            encoder_hidden_states=torch.randn(2, 16, 40, generator=seeded),
            added_cond_kwargs=added,
        ).sample


def adapted(unet: Any) -> set[str]:
    from peft.tuners.lora import LoraLayer

    return {name for name, module in unet.named_modules() if isinstance(module, LoraLayer)}


def test_targets() -> None:
    unet = make_pipeline().unet
    auto = resolve_targets(unet, "auto")
    attention = resolve_targets(unet, "attention")
    every = resolve_targets(unet, "all")
    assert auto == resolve_targets(unet, "attention+ff")
    assert set(attention) < set(auto) < set(every)
    ends = {name.split("transformer_blocks.0.")[1] for name in auto}
    heads = ("to_q", "to_k", "to_v", "to_out.0")
    assert ends == {f"{a}.{h}" for a in ("attn1", "attn2") for h in heads} | {
        "ff.net.0.proj",
        "ff.net.2",
    }
    assert {"conv1", "conv2", "proj_in", "time_emb_proj"} <= {n.split(".")[-1] for n in every}
    assert not any(name.startswith(("conv_in", "time_embedding", "add_emb")) for name in every)
    assert len(resolve_targets(unet, "attn2.to_q")) == 4
    assert len(resolve_targets(unet, ["to_q", "proj_in"])) == 12
    with pytest.raises(ConfigError, match=r"'attn2\.toq' matches none.*Did you mean"):
        resolve_targets(unet, ["to_q", "attn2.toq"])
    with pytest.raises(ConfigError, match="Did you mean 'attention'"):
        resolve_targets(unet, "atention")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_exactly_the_adapter_trains_in_float32(precision: str, pipeline_folder: Path) -> None:
    wing = build(str(pipeline_folder), adapter=LoRA(rank=2), **{**BUILD, "precision": precision})
    assert wing.adapter == "fresh"
    frozen = torch.bfloat16 if precision == "bf16" else torch.float32
    for name, parameter in wing.policy.unet.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        assert parameter.dtype == (torch.float32 if ".lora_" in name else frozen), name
    for part in (wing.policy.vae, wing.policy.text_encoder, wing.policy.text_encoder_2):
        assert not any(p.requires_grad for p in part.parameters())
        assert all(p.dtype == frozen for p in part.parameters())
    facts = wing.describe()
    trained = sum(p.numel() for n, p in wing.policy.unet.named_parameters() if ".lora_" in n)
    assert facts["trained_parameters"] == trained > 0
    assert len(adapted(wing.policy.unet)) == 40


def test_full_training_is_in_float32(pipeline_folder: Path) -> None:
    wing = build(str(pipeline_folder), adapter=None, **{**BUILD, "precision": "bf16"})
    assert wing.adapter == "none"
    for parameter in wing.policy.unet.parameters():
        assert parameter.requires_grad and parameter.dtype == torch.float32


def test_the_start_is_seeded_and_leaves_the_global_state_alone() -> None:
    def start(seed: int) -> Tensor:
        wing = build(make_pipeline(), adapter=LoRA(rank=2), **{**BUILD, "seed": seed})
        return torch.cat([p.flatten() for p in wing.policy.unet.parameters() if p.requires_grad])

    pipe = make_pipeline()
    before = torch.random.get_rng_state()
    build(pipe, adapter=LoRA(rank=2), **BUILD)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))


ADAPTERS = [
    {"rank": 4},
    {"rank": 4, "alpha": 1.0},
    {"rank": 2, "alpha": 7.5, "targets": "attention"},
    {"rank": 4, "alpha": 6, "kind": "rslora"},
    {"rank": 2, "alpha": 3, "targets": "all"},
    {"rank": 2, "alpha": 5, "targets": ["attn1.to_q", "ff.net.2"]},
    {"rank": 2, "alpha": 3, "kind": "dora"},
]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_saved_adapters_load_back_to_the_same_prediction(
    adapter: dict[str, Any], tmp_path: Path
) -> None:
    wing = wing_with(**adapter)
    base = prediction(make_pipeline().unet)
    assert torch.allclose(prediction(wing.policy.unet), base, atol=1e-6)
    move(wing)
    expected = prediction(wing.policy.unet)
    assert not torch.allclose(expected, base, atol=1e-2)
    wing.save(tmp_path / "model", base="owner/base")
    files = {path.name for path in (tmp_path / "model").iterdir()}
    dora = adapter.get("kind") == "dora"
    assert files == ({DIFFUSERS_FILE} if dora else {DIFFUSERS_FILE, KOHYA_FILE})
    for name in [None, *sorted(files)]:
        pipe = make_pipeline()
        pipe.load_lora_weights(tmp_path / "model", weight_name=name)
        assert torch.allclose(prediction(pipe.unet), expected, atol=1e-5), name
        assert adapted(pipe.unet) == adapted(wing.policy.unet)
    with safe_open(tmp_path / "model" / DIFFUSERS_FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.base_model_name_or_path"] == "owner/base"
    assert metadata["unet.lora_alpha"] == adapter.get("alpha", adapter["rank"])


def test_kohya_keys() -> None:
    wing = wing_with(rank=4, alpha=2, targets=["mid_block.attentions.0.proj_in", "attn1.to_out.0"])
    state = kohya_state(wing.policy.unet, "default")
    prefix = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0"
    assert state[f"{prefix}.lora_down.weight"].shape == (4, 32)
    assert state[f"{prefix}.lora_up.weight"].shape == (32, 4)
    assert state[f"{prefix}.alpha"].item() == 2
    assert "lora_unet_middle_block_1_proj_in.alpha" in state


def test_kohya_names_of_every_layer_come_back(tmp_path: Path) -> None:
    """diffusers' own reader, which knows the first release's names, finds each layer again."""
    layers = [n for n, m in make_pipeline().unet.named_modules() if is_layer(m)]
    wing = wing_with(rank=2, targets=layers)
    move(wing)
    wing.save(tmp_path, base=None)
    state = load_file(tmp_path / KOHYA_FILE)
    assert not [key for key in state if "down_blocks" in key or "up_blocks" in key]
    pipe = make_pipeline()
    pipe.load_lora_weights(tmp_path, weight_name=KOHYA_FILE)
    assert adapted(pipe.unet) == set(layers)
    assert torch.allclose(prediction(pipe.unet), prediction(wing.policy.unet), atol=1e-5)


def is_layer(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear | torch.nn.Conv2d)


def test_a_unet_of_another_build_keeps_diffusers_names(tmp_path: Path) -> None:
    wing = wing_with(rank=2, targets=["to_q"])
    unet = wing.policy.unet
    unet.register_to_config(layers_per_block=(1, 1))
    names = {key.rsplit(".", 1)[0] for key in kohya_state(unet, "default")}
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q" in {
        name.removesuffix(".lora_down").removesuffix(".lora_up") for name in names
    }


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("layout", ["diffusers", "kohya", "peft"])
def test_an_adapter_is_continued_in_place(
    layout: str, adapter: dict[str, Any], tmp_path: Path
) -> None:
    if layout == "kohya" and adapter.get("kind") == "dora":
        pytest.skip("DoRA has no kohya file")
    wing = wing_with(**adapter)
    move(wing)
    expected = prediction(wing.policy.unet)
    wing.save(tmp_path, base=None)
    if layout == "diffusers":
        (tmp_path / KOHYA_FILE).unlink(missing_ok=True)
    elif layout == "kohya":
        (tmp_path / DIFFUSERS_FILE).unlink()
    else:
        _as_peft(wing.policy.unet, tmp_path)
    going_on = wing_with(continue_from=str(tmp_path))
    unet = going_on.policy.unet
    assert going_on.adapter == "continued"
    assert list(unet.peft_config) == ["default"]
    assert torch.allclose(prediction(unet), expected, atol=1e-5)
    trained = {n for n, p in unet.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in unet.named_parameters() if ".lora_" in n}
    assert adapted(unet) == adapted(wing.policy.unet)
    with torch.no_grad(), going_on.adapters_off():
        base = prediction(make_pipeline().unet)
        assert torch.allclose(prediction(unet), base, atol=1e-6)
    # What is trained on is what is used and saved: no second, inactive adapter.
    move(going_on)
    moved = prediction(unet)
    assert not torch.allclose(moved, expected, atol=1e-2)
    going_on.save(tmp_path / "again", base=None)
    pipe = make_pipeline()
    pipe.load_lora_weights(tmp_path / "again")
    assert torch.allclose(prediction(pipe.unet), moved, atol=1e-5)


def _as_peft(unet: Any, folder: Path) -> None:
    from peft import get_peft_model_state_dict

    for file in folder.iterdir():
        file.unlink()
    unet.peft_config["default"].save_pretrained(folder)
    state = get_peft_model_state_dict(unet, adapter_name="default")
    named = {f"base_model.model.{k}": v.contiguous() for k, v in state.items()}
    save_file(named, folder / "adapter_model.safetensors")


def test_adapters_that_cannot_be_continued(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        wing_with(continue_from=str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"no \.safetensors file"):
        wing_with(continue_from=str(tmp_path))
    wing = wing_with(rank=2)
    wing.save(tmp_path, base=None)
    state = load_file(tmp_path / DIFFUSERS_FILE)
    down = torch.zeros(2, 16)
    key = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    (tmp_path / KOHYA_FILE).unlink()
    save_file({**state, key: down}, tmp_path / DIFFUSERS_FILE)
    with pytest.raises(ConfigError, match=r"UNet alone.*text_encoder.*fuse"):
        wing_with(continue_from=str(tmp_path))
    _as_peft(wing.policy.unet, tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    del state[next(iter(state))]
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"does not fit this UNet: 1 tensors"):
        wing_with(continue_from=str(tmp_path))


def test_a_pipeline_that_carries_an_adapter() -> None:
    first = wing_with(rank=2, alpha=1)
    move(first)
    pipe = first.policy
    with pytest.raises(ConfigError, match=r"carries 'default'.*fuse"):
        build(pipe, adapter=LoRA(rank=2), **BUILD)
    expected = prediction(pipe.unet)
    second = build(pipe, adapter=None, **BUILD)
    assert second.adapter == "continued"
    assert torch.equal(prediction(pipe.unet), expected)
    assert second.describe()["trained_parameters"] == first.describe()["trained_parameters"]


def test_full_models_are_saved_as_pipelines(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    wing = build(make_pipeline(), adapter=None, **BUILD)
    move(wing)
    wing.save(tmp_path / "model", base="owner/base")
    assert not list((tmp_path / "model").rglob("*.bin"))
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "model", use_safetensors=True)
    assert torch.equal(prediction(loaded.unet), prediction(wing.policy.unet))
    again = build(str(tmp_path / "model"), adapter=LoRA(rank=2), **BUILD)
    assert torch.equal(prediction(again.policy.unet), prediction(wing.policy.unet))


def test_a_continued_adapter_contradicts_no_option(tmp_path: Path) -> None:
    wing_with(rank=4, alpha=2).save(tmp_path, base=None)
    folder = str(tmp_path)
    assert wing_with(rank=4, alpha=2, continue_from=folder).adapter == "continued"
    for name, value in [("rank", 8), ("alpha", 4), ("kind", "dora")]:
        with pytest.raises(ConfigError, match=rf"keeps its {name}.*{value}"):
            wing_with(**{name: value}, continue_from=folder)
    with pytest.raises(ConfigError, match="keeps its layers"):
        wing_with(targets="attention", continue_from=folder)
