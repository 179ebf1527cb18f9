"""vLLM as the engine that samples: the policy's weights are handed to it before every rollout.

Its kernels round otherwise than the trainer's, so its log-probabilities come along, and
`losses.importance` weighs the answers by them. Not run on real hardware; the calls are checked
against a stand-in with vLLM's names.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit.adapters import adapter_layers
from alignkit.capabilities import SampledAnswer
from alignkit.draws import generator
from alignkit.errors import ConfigError
from alignkit.options import GenerationOptions
from alignkit.protocols import Collective
from alignkit.text.content import Ids
from alignkit.text.handed import eos_ids, max_positions

MEMORY = 0.4
"""The share of a GPU's memory that is vLLM's; the rest trains."""


class VLLMEngine:
    """See the module.

    Args:
        wing: with the policy.

    Raises:
        ConfigError: vLLM is not installed, or the adapter's base has no folder to load.
    """

    def __init__(self, wing: Any) -> None:
        try:
            import vllm
        except ImportError as error:
            raise ConfigError(
                "generation.engine='vllm' needs the package vllm, which is not installed: "
                "pip install 'alignkit[vllm]', or take engine='transformers'."
            ) from error
        self._vllm = vllm
        self._wing = wing
        self._place = Path(tempfile.mkdtemp(prefix="alignkit-vllm-"))
        weakref.finalize(self, shutil.rmtree, self._place, ignore_errors=True)
        self._handed = 0
        self._engine: Any = None

    def answer(
        self,
        prompts: Sequence[Ids],
        options: GenerationOptions,
        keys: Sequence[Sequence[int]],
        together: Collective | None,
    ) -> list[SampledAnswer]:
        """An answer to each prompt, by the policy as it is now."""
        if together is not None:
            raise ConfigError(
                "generation.engine='vllm' is handed whole weights, and trainer.sharding='fsdp2' "
                "divides them. Take engine='transformers', or sharding='none'."
            )
        adapter = self._hand_over()
        found = self._engine.generate(
            [{"prompt_token_ids": prompt.tolist()} for prompt in prompts],
            sampling_params=[self._parameters(options, key) for key in keys],
            lora_request=adapter,
            use_tqdm=False,
        )
        return [_answer(one.outputs[0]) for one in found]

    def _hand_over(self) -> Any:
        """Give the engine the policy's weights; returns the adapter to answer with, if any."""
        self._handed += 1
        with_adapter = self._wing.adapter != "none"
        folder = self._place / (str(self._handed) if with_adapter else "model")
        self._wing.save(folder)
        if not with_adapter:
            if self._engine is None:
                self._engine = self._made(str(folder))
            else:
                self._engine.collective_rpc("reload_weights")
                self._engine.reset_prefix_cache()
            return None
        if self._engine is None:
            self._engine = self._made(self._base(), enable_lora=True, max_lora_rank=self._rank())
        layers = list(adapter_layers(self._wing.policy))
        if any(layer.disable_adapters for layer in layers):
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(f"policy-{self._handed}", self._handed, str(folder))

    def _made(self, model: str, **more: Any) -> Any:
        dtype = self._wing.module.autocast
        return self._vllm.LLM(
            model=model,
            dtype="float32" if dtype is None else str(dtype).removeprefix("torch."),
            max_model_len=max_positions(self._wing.policy),
            gpu_memory_utilization=MEMORY,
            # Of the distribution that is drawn from, and with nothing of the model's own defaults.
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            seed=0,
            **more,
        )

    def _base(self) -> str:
        config = next(iter(self._wing.policy.peft_config.values()))
        base = config.base_model_name_or_path
        if not base or not Path(base).exists():
            raise ConfigError(
                "generation.engine='vllm' loads an adapter's base from its folder; this one was "
                f"trained on {base or 'a model in hand'}. Give the policy as a local folder, or "
                "take engine='transformers'."
            )
        return str(base)

    def _rank(self) -> int:
        rank = max(config.r for config in self._wing.policy.peft_config.values())
        return next(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank)

    def _parameters(self, options: GenerationOptions, key: Sequence[int]) -> Any:
        ends = eos_ids(self._wing.policy, self._wing.tokenizer)
        return self._vllm.SamplingParams(
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k or -1,
            max_tokens=options.max_new_tokens,
            stop=list(options.stop),
            include_stop_str_in_output=True,
            stop_token_ids=ends,
            ignore_eos=True,  # the tokens above are all that end an answer
            skip_special_tokens=False,
            logprobs=0,  # of the drawn token alone
            seed=int(generator("sample", *key).integers(2**31)),
        )


def _answer(output: Any) -> SampledAnswer:
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM gave an answer up: {output.finish_reason}")
    ids = list(output.token_ids)
    logps = [float(table[token].logprob) for token, table in zip(ids, output.logprobs, strict=True)]
    return SampledAnswer(ids, output.finish_reason == "stop", logps)
