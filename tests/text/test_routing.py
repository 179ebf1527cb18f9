"""The balance of experts: the model's own number, over real tokens, in loss and gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers as hf

from alignkit import DPO, KTO, SFT, ConfigError, LoRA, TextOptions, TrainerOptions, build
from alignkit.config import RunConfig, check
from alignkit.text.routing import Routers
from alignkit.text.wing import build as build_text
from tests.builders import VOCABULARY, tiny_lm, tiny_tokenizer, token_rows
from tests.text.models import seeded

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
MIXTURES = {
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(
            **SIZES, intermediate_size=48, num_local_experts=4, router_aux_loss_coef=0.02
        )
    ),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            **SIZES,
            intermediate_size=48,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
            num_experts=4,
            router_aux_loss_coef=0.02,
        )
    ),
}


def mixture(name: str) -> Any:
    return seeded(MIXTURES[name])


def padded(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of prompt + answer rows, made by hand; an answer's last token is no input."""
    content = batch.content
    rows = [
        [*content.prompts[owner].tolist(), *answer.tolist()[:-1]]
        for owner, answer in zip(content.owner, content.completions, strict=True)
    ]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def balance(logits: Any, mask: torch.Tensor, top: int) -> float:
    """E sum_e f_e P_e from the definition, token by token, in float64."""
    real = mask.reshape(-1).bool().tolist()
    experts = logits[0].shape[-1]
    chosen, probability, tokens = [0.0] * experts, [0.0] * experts, 0
    for layer in logits:
        for row, is_real in zip(layer.double().reshape(-1, experts), real, strict=True):
            if is_real:
                tokens += 1
                share = [math.exp(x) for x in row.tolist()]
                for e in range(experts):
                    probability[e] += share[e] / sum(share)
                for e in sorted(range(experts), key=lambda e: -share[e])[:top]:
                    chosen[e] += 1
    return experts * sum(f * p for f, p in zip(chosen, probability, strict=True)) / tokens**2


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("even", [True, False], ids=["unpadded", "padded"])
def test_it_is_the_model_s_own_number_over_real_tokens(name, even) -> None:
    model = mixture(name)
    wing = build_text((model, tiny_tokenizer()))
    rows = token_rows(6)
    if even:
        rows = [
            {k: (v * 5)[:size] for (k, v), size in zip(row.items(), (4, 5, 5), strict=True)}
            for row in rows
        ]
    batch = wing.examples(rows, TextOptions(packing="none"), kind="pairs", seed=0).collate(
        range(6), [0] * 6
    )
    ids, mask = padded(batch)
    assert bool(mask.all()) == even
    with torch.no_grad():
        found = wing.backend.module(batch, want=frozenset({"router"})).extras["router"]
        own = model(ids, attention_mask=mask, output_router_logits=True)
    assert found.shape == (12,) and found.unique().numel() == 1
    assert found[0].item() == pytest.approx(own.aux_loss.item(), rel=1e-6)
    top = model.config.num_experts_per_tok
    assert found[0].item() == pytest.approx(balance(own.router_logits, mask, top), rel=1e-5)


def first_step(given: float | str | None, checkpointing: bool = False) -> tuple[Any, Any]:
    options = TrainerOptions(
        max_steps=1,
        batch_size=6,
        micro_batch=6,
        learning_rate=1e-3,
        warmup=0,
        max_grad_norm=1e9,
        router_aux_loss_coef=given,
        gradient_checkpointing=checkpointing,
    )
    run = build(
        (mixture("mixtral"), tiny_tokenizer()),
        DPO(beta=0.1),
        token_rows(6),
        data_options=TextOptions(packing="none"),
        trainer=options,
    )
    seen: dict[str, torch.Tensor] = {}
    clip, names = run.runtime.clip, list(run.trainer.parameters)

    def watching(parameters: Any, norm: float) -> Any:
        seen.update({n: p.grad.clone() for n, p in zip(names, parameters, strict=True)})
        return clip(parameters, norm)

    run.runtime.clip = watching
    return next(run.steps()), seen


def test_the_loss_and_the_gradient_have_it_once() -> None:
    plain, without = first_step(None)
    record, found = first_step(0.5)
    aux = record.metrics["router/aux_loss"]
    assert aux > 1 and "router/aux_loss" not in plain.metrics
    assert record.loss == pytest.approx(plain.loss + 0.5 * aux, rel=1e-6)
    own, _ = first_step("model")
    assert own.loss == pytest.approx(plain.loss + 0.02 * aux, rel=1e-6)
    # d loss = d DPO + 0.5 d aux: what is left beside DPO's is the gradient of the model's number.
    wing = build_text((mixture("mixtral"), tiny_tokenizer()))
    batch = wing.examples(token_rows(6), TextOptions(), kind="pairs", seed=0).collate(
        range(6), [0] * 6
    )
    ids, mask = padded(batch)
    aux_loss = wing.policy(ids, attention_mask=mask, output_router_logits=True).aux_loss
    (0.5 * aux_loss).backward()
    expected = {f"policy.model.{n}": p.grad for n, p in wing.policy.named_parameters()}
    moved = [n for n, g in expected.items() if g is not None and g.norm() > 1e-6]
    assert any("gate" in name or "router" in name for name in moved)
    for name in moved:
        apart = (found[name] - without[name] - expected[name]).norm()
        assert apart <= 1e-5 * expected[name].norm() + 1e-7, name
    again, recomputed = first_step(0.5, checkpointing=True)
    assert again.loss == record.loss
    for name, gradient in recomputed.items():
        torch.testing.assert_close(gradient, found[name], rtol=1e-5, atol=1e-7)


def test_demonstrations_have_it_too() -> None:
    rows = [{"prompt": f"What is {i}?", "completion": "The sky." * (i % 3 + 1)} for i in range(6)]
    found = []
    for given in (None, 0.5):
        options = TrainerOptions(
            max_steps=1, batch_size=6, learning_rate=1e-3, router_aux_loss_coef=given
        )
        policy = (mixture("mixtral"), tiny_tokenizer(chat=False))
        found.append(next(build(policy, SFT(), rows, trainer=options).steps()))
    aux = found[1].metrics["router/aux_loss"]
    assert found[1].loss == pytest.approx(found[0].loss + 0.5 * aux, rel=1e-6) and aux > 1


def test_single_answers_and_adapters_have_it_too() -> None:
    rows = [
        {"prompt": f"What is {i}?", "completion": "The sky." * (i % 3 + 1), "label": i % 2 == 0}
        for i in range(6)
    ]
    for adapter in (None, LoRA(rank=2)):
        run = build(
            (mixture("qwen2_moe"), tiny_tokenizer(chat=False)),
            KTO(),
            rows,
            adapter=adapter,
            trainer=TrainerOptions(
                max_steps=2, batch_size=6, learning_rate=1e-3, router_aux_loss_coef="model"
            ),
        )
        for record in run.steps():
            assert record.metrics["router/aux_loss"] > 1


def test_a_dense_model_has_nothing_to_balance() -> None:
    assert Routers(tiny_lm("llama")).modules == []
    options = TrainerOptions(max_steps=1, learning_rate=1e-3, router_aux_loss_coef=0.1)
    with pytest.raises(ConfigError, match="LlamaForCausalLM has none with a load-balancing loss"):
        build((tiny_lm("llama"), tiny_tokenizer()), DPO(), token_rows(6), trainer=options)


@pytest.mark.parametrize(
    ("options", "modality", "why"),
    [
        ({}, "image", "a pipeline has none"),
        ({"compile": True}, "text", "compiled blocks do not allow"),
        ({"router_aux_loss_coef": -1.0}, "text", "at least 0"),
    ],
)
def test_where_it_cannot_be_it_is_refused(options, modality, why) -> None:
    with pytest.raises(ConfigError, match=why):
        given = TrainerOptions(**{"router_aux_loss_coef": 0.1, **options})
        check(RunConfig("policy", DPO(), "data.jsonl", trainer=given), modality)
