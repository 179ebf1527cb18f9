"""What is in the caller's hands comes back as it was, apart from its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from alignkit import DPO, DataError, GenerationOptions, LoRA, TrainerOptions, align, build
from alignkit.options import TextOptions
from alignkit.text.wing import build as build_text
from tests.builders import pair_rows, text_wing, tiny_lm, tiny_tokenizer

ADAPTERS = [None, LoRA(rank=4)]


def handed(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model in train mode but for one block, with a frozen embedding."""
    model = tiny_lm("gpt2", dropout=0.1).to(dtype).train()
    model.transformer.h[1].eval()
    model.transformer.wpe.requires_grad_(False)
    return model, tiny_tokenizer()


class Held:
    """The modules and parameters that the caller knows, and how they are."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.parameters = dict(model.named_parameters())

    def state(self) -> dict[str, Any]:
        modules = self.modules.items()
        return {
            "modes": {name: module.training for name, module in modules},
            "checkpointing": {n: getattr(m, "gradient_checkpointing", None) for n, m in modules},
            "hooks": {name: len(module._forward_hooks) for name, module in modules},
            "compiled": [name for name, m in modules if m._compiled_call_impl is not None],
            "gradients": {name: p.requires_grad for name, p in self.parameters.items()},
            "attributes": sorted(set(vars(self.model)) - {"peft_config"}),
        }


def options(**more: Any) -> TrainerOptions:
    return TrainerOptions(**{"max_steps": 2, "batch_size": 4, "learning_rate": 1e-3, **more})


def finished(run: Any) -> None:
    for _ in run.steps():
        pass
    run.finish()


def left(run: Any) -> None:
    for _ in run.steps():
        break


def failed(run: Any) -> None:
    with pytest.raises(RuntimeError, match="of the caller"):
        for _ in run.steps():
            raise RuntimeError("of the caller")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("end", [finished, left, failed])
def test_however_the_loop_ends(end, adapter, checkpointing) -> None:
    model, tokenizer = handed()
    held = Held(model)
    before = held.state()
    run = build(
        (model, tokenizer),
        DPO(),
        pair_rows(8),
        adapter=adapter,
        trainer=options(gradient_checkpointing=checkpointing),
    )
    end(run)
    assert held.state() == before


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_loop_that_was_left_goes_on_without_dropout(adapter) -> None:
    """Its losses are those of a loop that was never left."""
    losses: list[list[float]] = []
    for breaks in (False, True):
        model, tokenizer = handed()
        trainer = options(max_steps=4)
        run = build((model, tokenizer), DPO(), pair_rows(8), adapter=adapter, trainer=trainer)
        if breaks:
            left(run)
        finished(run)
        losses.append([line["loss"] for line in run.history])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_after_bad_rows_the_same_call_can_be_tried_again(adapter, dtype) -> None:
    model, tokenizer = handed(dtype)
    held, weights = Held(model), copy.deepcopy(model.state_dict())
    before = held.state()
    bad = [*pair_rows(3), {"prompt": "x", "chosen": "", "rejected": "y"}]
    with pytest.raises(DataError, match="chosen is empty"):
        align((model, tokenizer), DPO(), bad, adapter=adapter, trainer=options())
    assert held.state() == before and model.state_dict().keys() == weights.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, weights[name]), name
    align((model, tokenizer), DPO(), pair_rows(4), adapter=adapter, trainer=options())


def test_an_align_that_breaks_off_can_be_tried_again(monkeypatch) -> None:
    """Ctrl-C in the second step; an adapter in the caller's model would refuse the next one."""
    from alignkit.trainer import Trainer

    advance = Trainer._advance

    def interrupted(self: Trainer, batch: Any) -> Any:
        if self.step == 1:
            raise KeyboardInterrupt
        return advance(self, batch)

    model, tokenizer = handed()
    held = Held(model)
    before = held.state()
    given: dict[str, Any] = {"adapter": LoRA(rank=4), "trainer": options()}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_advance", interrupted)
        align((model, tokenizer), DPO(), pair_rows(8), **given)
    assert held.state() == before and not any("lora" in n for n, _ in model.named_modules())
    assert len(align((model, tokenizer), DPO(), pair_rows(8), **given).history) == 2


def test_a_run_that_is_dropped_gives_back_what_it_borrowed() -> None:
    model, tokenizer = handed()
    held = Held(model)
    before = held.state()
    run = build((model, tokenizer), DPO(), pair_rows(4), trainer=options())
    assert not model.training
    del run
    import gc

    gc.collect()
    assert held.state() == before


# ---- references in hand


@pytest.fixture(params=["fp32", "bf16"])
def precision(request: Any) -> Iterator[str]:
    yield request.param


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", ["the policy itself", "a twin in hand", "the same folder"])
def test_a_reference_that_is_the_policy_is_its_start(kind, adapter, precision, tmp_path) -> None:
    """Margin 0 at the first step, other than 0 at the last, and nothing of it changed."""
    model, tokenizer = tiny_lm("llama"), tiny_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    twin = tiny_lm("llama").train()
    policy: Any = (model, tokenizer)
    reference: Any = (twin, tokenizer)
    if kind == "the policy itself":
        reference = policy
    if kind == "the same folder":
        policy = reference = str(tmp_path)
    result = align(
        policy,
        DPO(),
        pair_rows(8),
        reference=reference,
        adapter=adapter,
        trainer=options(max_steps=3, log_every=1, learning_rate=1e-2, precision=precision),
    )
    assert result.history[0]["rewards/margins"] == 0.0 != result.history[-1]["rewards/margins"]
    assert twin.training and all(p.requires_grad for p in twin.parameters())
    for name, tensor in tiny_lm("llama").state_dict().items():
        assert torch.equal(twin.state_dict()[name], tensor)


# ---- sampling


def test_the_models_own_generation_defaults_play_no_part() -> None:
    wing = text_wing("llama")
    model, prompts = wing.policy, ["the sky", "tea"]
    expected = wing.sample(prompts, GenerationOptions(max_new_tokens=12), seed=0)
    own = model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.min_new_tokens = 3.0, 1, 12
    own.do_sample, own.temperature, own.top_k, own.num_beams = True, 0.1, 1, 2
    before = own.to_dict()
    assert wing.sample(prompts, GenerationOptions(max_new_tokens=12), seed=0) == expected
    assert model.generation_config is own and own.to_dict() == before


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_prompts_beyond_the_models_positions_lose_their_start(adapter) -> None:
    """GPT-2 has 256 learned positions; reading past their end kills a GPU process."""
    wing = text_wing("gpt2", adapter, chat=False)
    long, short = "the sky " * 200, "tea"
    options = GenerationOptions(max_new_tokens=40)
    answers = wing.sample([long, short, "red fox " + long], options, seed=0)
    assert wing.sample([long], options, seed=0) == answers[:1]
    assert wing.sample([short, short], options, seed=0)[1] == answers[1]
    endless = GenerationOptions(max_new_tokens=1000, temperature=0)
    assert all(wing.sample([long, short], endless, seed=0))


def test_rows_beyond_the_models_positions_are_refused_with_the_limit() -> None:
    wing = text_wing("gpt2", chat=False)
    rows = [{"prompt": "the sky " * 200, "chosen": " is blue", "rejected": " is red"}]
    from alignkit.errors import ConfigError

    with pytest.raises(ConfigError, match=r"256 positions. Set data_options.max_length=256"):
        wing.examples(rows, TextOptions(), kind="pairs", seed=0)
    limited = TextOptions(max_length=256, truncation="keep_end")
    assert len(wing.examples(rows, limited, kind="pairs", seed=0)) == 1


def test_packing_says_whether_lengths_are_sorted() -> None:
    rows = pair_rows(9)
    seen = {}
    for packing in ("none", "bucket", "auto"):
        wing = build_text((tiny_lm("llama"), tiny_tokenizer()))
        examples = wing.examples(rows, TextOptions(packing=packing), kind="pairs", seed=0)
        batch = examples.collate(range(9), [0] * 9)
        pieces = wing.backend.split(batch, 2)
        seen[packing] = [row for piece in pieces for row in piece.row_id.tolist()]
        assert sorted(seen[packing]) == list(range(9))
    assert seen["none"] == seen["auto"] == list(range(9)) != seen["bucket"]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_compilation_covers_policy_and_reference_and_leaves_no_trace(adapter, monkeypatch) -> None:
    """The compiler is a stand-in that counts: what it does to a block is torch's affair."""
    calls: list[str] = []

    def stand_in(self: Any) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append("no grad" if not torch.is_grad_enabled() else "grad")
            return self._call_impl(*args, **kwargs)

        self._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", stand_in)
    model, tokenizer = handed()
    held = Held(model)
    before = held.state()
    run = build(
        (model, tokenizer), DPO(), pair_rows(8), adapter=adapter, trainer=options(compile=True)
    )
    finished(run)
    assert held.state() == before
    # Two blocks, two steps; the reference runs without gradients, the policy with them.
    assert calls.count("no grad") == calls.count("grad") == 4
    run.wing.engage()
    assert run.wing.sample(["tea"], GenerationOptions(max_new_tokens=3), seed=0)
    assert len(calls) == 8


def test_dropout_that_checkpointing_would_turn_on_is_found() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    from alignkit.errors import ConfigError
    from alignkit.text.policy import checkpointing_obstacle

    sizes = {"vocab_size": 384, "hidden_size": 32, "ffn_dim": 32, "num_attention_heads": 4}
    model = OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=1, dropout=0.1))
    with pytest.raises(ConfigError, match=r"applies dropout by its own \['dropout'\].*to false"):
        build_text((model, tiny_tokenizer()), gradient_checkpointing=True)
    assert checkpointing_obstacle(tiny_lm("gpt2", dropout=0.1)) is None
