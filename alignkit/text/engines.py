"""What answers prompts in tokens: the model in hand, or an engine for inference beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alignkit.capabilities import SampledAnswer
from alignkit.options import GenerationOptions
from alignkit.protocols import Collective
from alignkit.text.content import Ids
from alignkit.text.generation import generate
from alignkit.text.handed import eos_ids, evaluating, uncompiled

Engine = Callable[
    [Any, Sequence[Ids], GenerationOptions, Sequence[Sequence[int]], Collective | None],
    list[SampledAnswer],
]
"""`(wing, prompts, options, keys, together) -> answers`, see `capabilities.SamplesTokens`."""


def in_process(
    wing: Any,
    prompts: Sequence[Ids],
    options: GenerationOptions,
    keys: Sequence[Sequence[int]],
    together: Collective | None,
) -> list[SampledAnswer]:
    """The policy itself, by transformers' generate."""
    ends = eos_ids(wing.policy, wing.tokenizer)
    with evaluating(wing.policy), uncompiled(wing.policy):
        return wing.module.within(
            lambda model: generate(model, wing.tokenizer, prompts, options, keys, ends, together)
        )


def by_vllm(
    wing: Any,
    prompts: Sequence[Ids],
    options: GenerationOptions,
    keys: Sequence[Sequence[int]],
    together: Collective | None,
) -> list[SampledAnswer]:
    """A vLLM engine with the policy's weights of this moment; made on first use."""
    from alignkit.text.vllm_engine import VLLMEngine

    if wing.engine is None:
        wing.engine = VLLMEngine(wing)
    return wing.engine.answer(prompts, options, keys, together)


ENGINES: Mapping[str, Engine] = {"transformers": in_process, "vllm": by_vllm}
"""Name, as in `GenerationOptions.engine` -> the engine."""
