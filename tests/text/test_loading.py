"""Which folders are taken for a policy, and what of them is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn import init

from alignkit.adapters import adapters_off
from alignkit.errors import ConfigError
from alignkit.options import LoRA, TextOptions
from alignkit.text.wing import build
from tests.builders import pair_rows, tiny_lm, tiny_tokenizer

EVERY_KIND = {
    "layers": {},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [5, 6]},
}
IDS = torch.arange(4, 24)[None]


def save_base(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    tiny_lm("llama").to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, **changed: Any) -> Path:
    """An adapter that does something, as peft saves it: without a tokenizer."""
    given = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changed}
    model = tiny_lm("llama")
    model.name_or_path = str(base)
    adapted = get_peft_model(model, LoraConfig(**given))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


# peft says that it saves a whole embedding that carries an adapter, which is what is wanted.
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_an_adapter_folder_is_continued_whatever_it_trains(kind, base, tmp_path) -> None:
    """With the base's tokenizer, all of the adapter trained, and all of it switched off."""
    folder = save_adapter(tmp_path, base, **EVERY_KIND[kind])
    saved = load_file(folder / "adapter_model.safetensors")
    wing = build(str(folder))
    assert wing.adapter == "continued"
    trained = sum(p.numel() for p in wing.policy.parameters() if p.requires_grad)
    assert trained == sum(t.numel() for name, t in saved.items() if "base_layer" not in name)
    assert len(wing.examples(pair_rows(3), TextOptions(), kind="pairs", seed=0)) == 3
    with torch.no_grad(), adapters_off(wing.policy):
        without = wing.policy(input_ids=IDS).logits
    assert torch.equal(without, tiny_lm("llama").eval()(input_ids=IDS).logits)
    assert not torch.equal(without, wing.policy(input_ids=IDS).logits)
    assert trained == sum(p.numel() for p in wing.policy.parameters() if p.requires_grad)


def test_an_adapter_that_would_be_unpickled_is_refused(base, tmp_path) -> None:
    folder = save_adapter(tmp_path, base)
    weights = load_file(folder / "adapter_model.safetensors")
    torch.save(weights, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    for policy, adapter in ((folder, None), (base, LoRA(continue_from=str(folder)))):
        with pytest.raises(ConfigError, match=r"must hold adapter_model\.safetensors"):
            build(str(policy), adapter=adapter)


def test_weights_that_would_be_unpickled_are_refused(base, tmp_path) -> None:
    save_base(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="could not be loaded"):
        build(str(tmp_path))


def test_a_continued_adapter_keeps_its_shape(base, tmp_path) -> None:
    folder = str(save_adapter(tmp_path, base))
    assert build(str(base), adapter=LoRA(continue_from=folder)).adapter == "continued"
    for adapter, words in (
        (LoRA(continue_from=folder, rank=8), "keeps its rank; .* has 4, adapter.rank says 8"),
        (LoRA(continue_from=folder, kind="dora"), "keeps its kind"),
        (LoRA(continue_from=folder, targets="attention"), "keeps its layers"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(str(base), adapter=adapter)
    with pytest.raises(ConfigError, match="continue_from must be the folder or hub name"):
        build(str(base), adapter=LoRA(continue_from=str(base)))


def test_code_of_a_repository_is_never_run(base, tmp_path) -> None:
    """Nor is anybody asked whether it may be."""
    save_base(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "theirs.py").write_text("raise SystemExit('their code ran')")
    with pytest.raises(ConfigError, match="could not be loaded"):
        build(str(tmp_path))


def test_a_checkpoint_without_its_head_is_refused(tmp_path) -> None:
    """It would be given a random one, and train on."""
    model = tiny_lm("llama")
    model.model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks weights of LlamaForCausalLM.*: lm_head\.weight"):
        build(str(tmp_path))


@pytest.mark.parametrize("disk", [torch.float32, torch.bfloat16, torch.float16])
def test_master_weights_are_those_on_disk(disk, tmp_path) -> None:
    """Also where the arithmetic is done in 16 bits, which would round them."""
    save_base(tmp_path, disk)
    saved = load_file(tmp_path / "model.safetensors")
    wing = build(str(tmp_path), precision="bf16")
    for name, parameter in wing.policy.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.requires_grad
        assert torch.equal(parameter.detach(), saved[name].float()), name


def test_layers_that_peft_cannot_adapt_are_refused_and_leave_the_model_whole() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=384, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = MambaForCausalLM(config)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError, match=r"cannot adapt these layers.*adapter\.targets"):
        build((model, tiny_tokenizer()), adapter=LoRA())
    assert [name for name, _ in model.named_modules()] == names


def other_models() -> list[tuple[Any, str]]:
    from transformers import (
        BertConfig,
        BertLMHeadModel,
        LlamaForSequenceClassification,
        T5Config,
        T5ForConditionalGeneration,
    )

    bert = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 384}
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 384}
    llama = tiny_lm("llama")
    return [
        (llama.model, "LlamaModel is no causal language model"),
        (LlamaForSequenceClassification(llama.config), "its logits are not those of tokens"),
        (T5ForConditionalGeneration(T5Config(**t5)), "T5ForConditionalGeneration is no causal"),
        (BertLMHeadModel(BertConfig(**bert)), "after the first token depends on the second"),
    ]


@pytest.mark.parametrize(("model", "words"), other_models(), ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)])
def test_models_that_are_not_causal_are_refused_as_they_came(model, words, adapter) -> None:
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError, match=words):
        build((model.train(), tiny_tokenizer()), adapter=adapter)
    assert [name for name, _ in model.named_modules()] == names and model.training


def test_an_adapter_of_another_model_is_refused_and_leaves_the_model_whole(base, tmp_path) -> None:
    folder = save_adapter(tmp_path, base)
    model = tiny_lm("gpt2")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError, match="does not fit GPT2LMHeadModel"):
        build((model, tiny_tokenizer()), adapter=LoRA(continue_from=str(folder)))
    assert [name for name, _ in model.named_modules()] == names
