"""vLLM's names and calls against a stand-in that loads what it is handed and samples off by a known
amount; and the weights that undo it."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from alignkit import DPO, ConfigError, GenerationOptions
from alignkit.api import build
from alignkit.losses.importance import mismatch, truncated_importance
from alignkit.options import LoRA
from alignkit.text.wing import build as build_text
from tests.builders import pair_rows, text_wing, tiny_lm, tiny_tokenizer
from tests.text.test_sampling import batch_of
from tests.text.vllm_stand_in import LLM, install


@pytest.fixture(autouse=True)
def vllm(monkeypatch: Any) -> None:
    install(monkeypatch)


ASKED = [np.arange(5, 5 + size, dtype=np.int32) for size in (4, 9, 6)]
BY_VLLM = GenerationOptions(max_new_tokens=8, engine="vllm")


def answered(wing: Any, number: int = 0, asked: Any = ASKED, options: Any = BY_VLLM) -> Any:
    keys = [(0, number, place) for place in range(len(asked))]
    return wing.generate_tokens(asked, options, keys=keys)


def policy_logps(wing: Any, found: Any, asked: Any = ASKED) -> tuple[Any, Any, Any]:
    """Of the sampled tokens: the policy's, the sampler's, and which are there."""
    batch = batch_of(asked, found)
    with torch.no_grad():
        made = wing.backend.module(batch, None, frozenset({"token_logps", "token_mask"})).extras
    theirs = torch.zeros_like(made["token_logps"])
    for row, one in zip(theirs, found, strict=True):
        row[: len(one.logps)] = torch.tensor(one.logps)
    return made["token_logps"], theirs, made["token_mask"]


def test_an_engine_that_computes_alike_weighs_1() -> None:
    wing = text_wing("llama")
    first = answered(wing)
    assert [one.ids for one in first] == [one.ids for one in answered(wing)]
    assert [one.ids for one in first] != [one.ids for one in answered(wing, number=1)]
    mine, theirs, mask = policy_logps(wing, first)
    weights = truncated_importance(mine, theirs, mask)
    assert torch.allclose(weights[mask], torch.ones(int(mask.sum())), atol=1e-4)
    assert not weights[~mask].any() and mismatch(mine, theirs, mask)["mismatch/max"] < 1e-4
    (engine,) = LLM.made
    assert engine.options["logprobs_mode"] == "processed_logprobs"
    assert engine.options["max_model_len"] == 256 and engine.options["dtype"] == "float32"


def test_the_engine_has_the_weights_of_the_moment() -> None:
    wing = text_wing("llama")
    answered(wing)
    with torch.no_grad():
        for parameter in wing.policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator()))
    mine, theirs, mask = policy_logps(wing, answered(wing))
    assert len(LLM.made) == 1 and torch.allclose(mine[mask], theirs[mask], atol=1e-4)


def test_an_adapter_is_handed_over_and_left_off(tmp_path: Path) -> None:
    tiny_lm("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    wing = build_text(str(tmp_path), adapter=LoRA(rank=4))
    with torch.no_grad():
        for name, parameter in wing.policy.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    mine, theirs, mask = policy_logps(wing, answered(wing))
    assert torch.allclose(mine[mask], theirs[mask], atol=1e-4)
    with wing.adapters_off():
        mine, theirs, mask = policy_logps(wing, answered(wing))
    assert torch.allclose(mine[mask], theirs[mask], atol=1e-4)
    assert [one and one.lora_int_id for one in LLM.adapters] == [1, None]
    assert LLM.made[0].folder == str(tmp_path) and LLM.made[0].options["max_lora_rank"] == 8
    with pytest.raises(ConfigError, match="loads an adapter's base from its folder"):
        answered(build_text((tiny_lm(), tiny_tokenizer()), adapter=LoRA(rank=4)))


def test_weights_undo_an_engine_that_is_off(monkeypatch: Any) -> None:
    """The engine adds 0.7 to one token's logit. A token's weight is p / q, where it is below the
    cap; the weighted mean of a function is its mean under the policy, within four errors."""
    off, liked, num = torch.zeros(384, dtype=torch.float64), list(range(100)), 1200
    off[liked] = 0.7
    monkeypatch.setattr(LLM, "off", off)
    wing, asked = text_wing("llama"), [ASKED[0]] * num
    with torch.no_grad():
        ids = torch.from_numpy(ASKED[0])[None].long()
        logits = wing.policy(input_ids=ids).logits[0, -1].double()
    p, q = logits.softmax(-1), (logits + off).softmax(-1)
    found = answered(wing, asked=asked, options=GenerationOptions(max_new_tokens=1, engine="vllm"))
    tokens = torch.tensor([one.ids[0] for one in found])
    mine, theirs, mask = policy_logps(wing, found, asked)
    weights = truncated_importance(mine, theirs, mask, cap=math.inf, band=None)[:, 0]
    assert torch.allclose(weights.double(), (p / q)[tokens], rtol=1e-3)
    capped = truncated_importance(mine, theirs, mask, cap=1.2, band=None)[:, 0]
    assert torch.allclose(capped, weights.clamp(max=1.2)) and (weights > 1.2).any()
    value = torch.isin(tokens, torch.tensor(liked)).double()
    truth, plain, weighed = p[liked].sum(), value.mean(), weights.double() * value
    error = weighed.std() / math.sqrt(num)
    assert abs(weighed.mean() - truth) < 4 * error and abs(plain - truth) > 4 * error
    kl = float((q * (q / p).log()).sum())
    assert float(mismatch(mine, theirs, mask)["mismatch/kl"]) == pytest.approx(kl, abs=0.05)


def test_an_answer_from_elsewhere_weighs_nothing() -> None:
    """Geometric mean ratios e^0.2, e^-0.8 and e^0.8, of which [.5, 2] keeps the first."""
    sampler = torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -1.0, -1.0], [-3.0, -9.0, -9.0]])
    mask = torch.tensor([[True, True, False], [True] * 3, [True, False, False]])
    policy = sampler + torch.tensor([[0.6, -0.2, math.nan], [-0.8] * 3, [0.8, math.nan, 0.0]])
    weights = truncated_importance(policy, sampler, mask, cap=1.5)
    assert weights.tolist() == [pytest.approx([1.5, math.exp(-0.2), 0]), [0] * 3, [0] * 3]
    every = truncated_importance(policy, sampler, mask, cap=1.5, band=None)
    assert every[1].tolist() == pytest.approx([math.exp(-0.8)] * 3) and every[2, 0] == 1.5
    seen = mismatch(policy, sampler, mask)
    assert float(seen["mismatch/max"]) == pytest.approx(0.8)
    assert float(seen["mismatch/kl"]) == pytest.approx((-0.6 + 0.2 + 2.4 - 0.8) / 6)


def test_what_vllm_cannot_do_is_refused(monkeypatch: Any) -> None:
    wing = text_wing("llama")
    with pytest.raises(ConfigError, match=r"handed whole weights.*fsdp2"):
        wing.generate_tokens(ASKED, BY_VLLM, keys=[(0,)] * 3, together=SimpleNamespace())
    for name in list(sys.modules):
        if name == "vllm" or name.startswith("vllm."):
            monkeypatch.delitem(sys.modules, name)
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed")
    with pytest.raises(ConfigError, match="needs the package vllm"):
        answered(text_wing("llama"))
    with pytest.raises(ConfigError, match="needs the package vllm"):
        build((tiny_lm(), tiny_tokenizer()), DPO(), pair_rows(2), generation=BY_VLLM)


# ---- rollouts


def advantages(monkeypatch: Any, off: Any, **generation: Any) -> Any:
    """Of the first minibatch of an online run, and what the run was told of the mismatch."""
    from alignkit import REINFORCE, TrainerOptions

    monkeypatch.setattr(LLM, "off", off)
    run = build(
        (tiny_lm("llama"), tiny_tokenizer()),
        REINFORCE(kl_coef=0.0, whiten_advantages=False, truncation="as_end"),
        [{"prompt_ids": [5 + place, 6, 7]} for place in range(8)],
        reward=lambda prompts, responses, rows: [1.0 + place for place in range(len(prompts))],
        generation=GenerationOptions(max_new_tokens=3, **generation),
        trainer=TrainerOptions(max_steps=1, batch_size=8, learning_rate=1e-3, shuffle=False),
    )
    batch = next(iter(run.trainer.source))
    return batch.experience.tokens, batch.experience.phase


def test_rollouts_weigh_what_an_engine_sampled_otherwise(monkeypatch: Any) -> None:
    """The advantages of a run by vLLM are those without a weight, times min(p / q, 2)."""
    from alignkit import rollouts

    _, own = advantages(monkeypatch, 0.0)
    assert own["mismatch/max"] < 1e-4, "the policy itself"
    off = torch.zeros(384, dtype=torch.float64)
    off[:150] = 1.5
    weighed, told = advantages(monkeypatch, off, engine="vllm")
    seen: list[Any] = []

    def unweighed(policy: Any, sampler: Any, mask: Any) -> Any:
        seen.append(truncated_importance(policy, sampler, mask))
        return torch.ones_like(policy)

    monkeypatch.setattr(rollouts, "truncated_importance", unweighed)
    plain, _ = advantages(monkeypatch, off, engine="vllm")
    (weights,) = seen
    mask = plain["mask"]
    assert told["mismatch/max"] > 0.3 and len(weights[mask].unique()) > 4
    found = (weighed["advantages"] / plain["advantages"])[mask].sort().values
    assert torch.allclose(found, weights[mask].sort().values, rtol=1e-4)
