"""A stand-in with vLLM's names: it loads what it is handed, and samples off by a known amount."""

from __future__ import annotations

import importlib.machinery
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM


@dataclass
class SamplingParams:
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop: list[str]
    include_stop_str_in_output: bool
    stop_token_ids: list[int]
    ignore_eos: bool
    skip_special_tokens: bool
    logprobs: int
    seed: int


class LLM:
    """Samples with `OFF` added to every logit row."""

    off: torch.Tensor | float = 0.0
    made: list[Any] = []  # noqa: RUF012
    adapters: list[Any] = []  # noqa: RUF012

    def __init__(self, model: str, **options: Any) -> None:
        self.folder, self.options = model, options
        LLM.made.append(self)
        self.collective_rpc("reload_weights")

    def collective_rpc(self, method: str) -> None:
        assert method == "reload_weights"
        self.model = AutoModelForCausalLM.from_pretrained(self.folder).eval()

    def reset_prefix_cache(self) -> None: ...

    @torch.no_grad()
    def generate(
        self,
        prompts: list[dict[str, list[int]]],
        sampling_params: list[SamplingParams],
        lora_request: Any,
        use_tqdm: bool,
    ) -> list[Any]:
        model = self.model
        LLM.adapters.append(lora_request)
        if lora_request is not None:
            from peft import PeftModel

            base = AutoModelForCausalLM.from_pretrained(self.folder)
            model = PeftModel.from_pretrained(base, lora_request.lora_path).eval()
        return [
            self._one(model, prompt["prompt_token_ids"], given)
            for prompt, given in zip(prompts, sampling_params, strict=True)
        ]

    def _one(self, model: Any, prompt: list[int], given: SamplingParams) -> Any:
        draw, ids, tables = np.random.default_rng(given.seed), list(prompt), []
        for _ in range(given.max_tokens):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            chances = ((logits + LLM.off) / given.temperature).softmax(-1)
            token = int(draw.choice(len(chances), p=chances.numpy() / chances.numpy().sum()))
            ids.append(token)
            tables.append({token: SimpleNamespace(logprob=float(chances[token].log()))})
            if token in given.stop_token_ids:
                break
        reason = "stop" if ids[-1] in given.stop_token_ids else "length"
        new = SimpleNamespace(token_ids=ids[len(prompt) :], finish_reason=reason, logprobs=tables)
        return SimpleNamespace(outputs=[new])


def install(monkeypatch: Any) -> None:
    """Have `import vllm` find the stand-in, which has made nothing yet."""
    names: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams},
        "vllm.lora": {},
        "vllm.lora.request": {
            "LoRARequest": lambda name, number, path: SimpleNamespace(
                lora_name=name, lora_int_id=number, lora_path=path
            )
        },
    }
    for name, members in names.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(LLM, "off", 0.0)
    LLM.made.clear()
    LLM.adapters.clear()
