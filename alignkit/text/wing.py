"""The text wing put together: model, tokenizer, likelihood, data, sampling, saving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from alignkit.adapters import active_adapters, adapter_on, adapters_off
from alignkit.capabilities import Sampled, SampledAnswer
from alignkit.columns import check_kind
from alignkit.mixtures import Mixture
from alignkit.options import GenerationOptions, LoRA, TextOptions
from alignkit.placed import size_of
from alignkit.protocols import Collective, Wing
from alignkit.rows import read_rows
from alignkit.stream import open_stream
from alignkit.text.backend import TextBackend
from alignkit.text.content import Ids
from alignkit.text.data import Reader, read_examples
from alignkit.text.engines import ENGINES
from alignkit.text.examples import TextExamples
from alignkit.text.fit import check_fit, check_room
from alignkit.text.formats import prompt_text
from alignkit.text.handed import State, base_of, save_weights
from alignkit.text.likelihood import TextLikelihood
from alignkit.text.loading import load, refuse_other_models
from alignkit.text.mixed import read_mixture
from alignkit.text.module import TextModule
from alignkit.text.noise import embedding_of
from alignkit.text.notes import write_notes
from alignkit.text.policy import detach
from alignkit.text.prompts import distinct_prompts, prompt_ids
from alignkit.text.row_kinds import LAYOUTS
from alignkit.text.streamed import TextStream
from alignkit.text.together import DTYPES, put_together
from alignkit.text.value import ValueHead, read_values


def build(
    policy: Any,
    *,
    adapter: LoRA | None = None,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    gradient_checkpointing: bool | str = False,
    seed: int = 0,
    neftune_alpha: float | None = None,
    beside: Wing | None = None,
) -> TextWing:
    """Load a causal language model and mark what is trained.

    Args:
        policy: folder, hub name, or (model, tokenizer); a model in hand trains in place.
        adapter: a LoRA to attach or continue; None trains all weights.
        device: where to compute.
        precision: "fp32", "bf16" or "fp16" of frozen weights and of the arithmetic; trained
            weights are float32 in any case. Frozen weights in hand keep their dtype.
        gradient_checkpointing: recompute block activations in backward; "auto" does so on GPUs.
        seed: of the adapter's initial weights.
        neftune_alpha: strength of the noise on the embeddings of training forwards.
        beside: the policy's wing, if this model is its reference.

    Raises:
        ConfigError: if the policy or the adapter's targets are not usable.
    """
    dtype = DTYPES[precision]
    whole = adapter is None if beside is None else beside.adapter == "none"
    masters = torch.float32 if whole else dtype
    bits = None if adapter is None else adapter.quantization
    model, tokenizer = load(policy, dtype=dtype, masters=masters, quantization=bits, device=device)
    refuse_other_models(model)
    if neftune_alpha is not None:
        embedding_of(model)
    wing = put_together(
        model,
        tokenizer,
        TextWing,
        TextLikelihood,
        in_hand=isinstance(policy, (tuple, list)),
        adapter=adapter,
        device=device,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
        beside=beside,
    )
    wing.backend.neftune_alpha = neftune_alpha
    return wing


class TextWing:
    """See `alignkit.protocols.Wing`.

    Args:
        model: the policy.
        tokenizer: its tokenizer.
        module: its likelihood module.
        adapter: "none", "fresh" or "continued".
        before: how the model came.
        dtypes: parameter -> its dtype when it came.
        added: the adapter that was attached here, if any.
    """

    modality = "text"
    notes: Mapping[str, Any] = MappingProxyType({})  # of a critic, written beside its weights
    default_options = TextOptions()

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        module: TextModule,
        *,
        adapter: str,
        before: State,
        dtypes: Mapping[nn.Parameter, torch.dtype],
        added: LoRA | None,
    ) -> None:
        self.policy = model
        self.tokenizer = tokenizer
        self.module = module
        self.backend = TextBackend(module)
        self.adapter = adapter
        self.chat = bool(getattr(tokenizer, "chat_template", None))
        self._before = before
        self._dtypes = dtypes
        self._added = added is not None
        self._working: State | None = None
        self.engine: Any = None

    def adapters_off(self) -> AbstractContextManager[None]:
        return adapters_off(self.policy)

    def adapter_on(self, name: str) -> AbstractContextManager[None]:
        return adapter_on(self.policy, name)

    def trained_adapters(self) -> list[str]:
        return active_adapters(self.policy)

    def examples(
        self,
        data: Any,
        options: TextOptions,
        *,
        kind: str,
        seed: int,
        loss_on: str = "completion",
        room: int = 0,
    ) -> TextExamples:
        check_kind(kind, tuple(LAYOUTS))
        if isinstance(data, Mixture):
            examples = read_mixture(data, self.tokenizer, options, kind, loss_on, room)
        else:
            rows = read_rows(data, columns=options.columns)
            examples = read_examples(rows, self.tokenizer, options, kind, loss_on, room=room)
        check_fit(self.policy, examples, room)
        self.chat = examples.chat
        self.backend.choose(options.packing, options.attention)
        return examples

    def stream(
        self,
        data: Any,
        options: TextOptions,
        *,
        kind: str,
        loss_on: str = "completion",
        room: int = 0,
        first: int = 0,
    ) -> TextStream:
        """Rows that are prepared while the model trains; they are numbered from `first` on."""
        check_kind(kind, tuple(LAYOUTS))
        opened = open_stream(data, columns=options.columns)
        reader = partial(Reader, opened, self.tokenizer, options, kind, loss_on, room)
        found = TextStream(opened, reader, partial(check_fit, self.policy, room=room), first)
        self.chat = (self.chat and first > 0) or found.chat
        self.backend.choose(options.packing, options.attention)
        return found

    def sample(self, prompts: Sequence[Any], options: GenerationOptions, *, seed: int) -> list[str]:
        """One answer per prompt; bare strings are wrapped as a user's turn if the data was chat."""
        return self.sample_counted(prompts, options, seed=seed).answers

    def sample_counted(
        self, prompts: Sequence[Any], options: GenerationOptions, *, seed: int
    ) -> Sampled:
        """The same, with the tokens of prompts and answers."""
        ids = prompt_ids(self.tokenizer, prompts, chat=self.chat)
        keys = [(seed, place) for place in range(len(ids))]
        new = ENGINES[options.engine](self, ids, options, keys, None)
        asked, answered = [prompt.tolist() for prompt in ids], [one.ids for one in new]
        texts = self.answer_texts(prompts, answered)
        return Sampled(texts, asked, answered, [not one.ended for one in new])

    def answer_texts(self, prompts: Sequence[Any], answers: Sequence[Sequence[int]]) -> list[str]:
        """See `alignkit.capabilities.SamplesTokens`."""
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
        # The answer to a plain text goes on where that ends, with a blank if need be.
        return [
            text.strip() if self.chat or not isinstance(prompt, str) else text.rstrip()
            for prompt, text in zip(prompts, texts, strict=True)
        ]

    def generate_tokens(
        self,
        prompts: Sequence[Ids],
        options: GenerationOptions,
        *,
        keys: Sequence[Sequence[int]],
        together: Collective | None = None,
    ) -> list[SampledAnswer]:
        """See `alignkit.capabilities.SamplesTokens`.

        Raises:
            ConfigError: a prompt leaves no room for an answer.
        """
        check_room(self.policy, prompts, options.max_new_tokens)
        return ENGINES[options.engine](self, prompts, options, keys, together)

    def value_head(self) -> ValueHead:
        return read_values(self.module)

    def scalar(self, init: str | Path = "policy", *, adapter: LoRA | None = None) -> TextBackend:
        """See `capabilities.ScoresStates`."""
        from alignkit.text.scalar_wing import critic_of

        return critic_of(self, init, adapter).backend

    def prompts(self, data: Any, options: TextOptions, limit: int) -> list[Any]:
        return distinct_prompts(data, self.tokenizer, options, limit)

    @staticmethod
    def prompt_text(prompt: Any) -> str:
        return prompt_text(prompt)

    def describe(self) -> dict[str, Any]:
        parameters = list(self.policy.parameters())
        base = base_of(self.policy)
        return {
            "class": type(base).__name__,
            "parameters": sum(size_of(p) for p in parameters),
            "trained parameters": sum(size_of(p) for p in parameters if p.requires_grad),
            "dtype": str(next(base.parameters()).dtype).removeprefix("torch."),
            "device": str(next(base.parameters()).device),
            **self.backend.facts(),
            "unit of the log-ratio": "nats, summed over completion tokens",
        }

    def save(
        self,
        folder: Path,
        *,
        base: str | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """A model folder (`from_pretrained`) or an adapter folder (`PeftModel.from_pretrained`)."""
        save_weights(self.policy, folder, weights)
        self.tokenizer.save_pretrained(folder)
        write_notes(folder, self.notes)

    def engage(self) -> None:
        """Eval mode, gradient flags and checkpointing as they were while training."""
        if self._working is not None:
            self._working.restore()
            self._working = None

    def release(self) -> None:
        """Give the model back as it came, apart from its weights."""
        if self._working is None:
            self._working = State(self.policy)
            self.policy.train(self._before.training)
            self._before.restore()

    def undo(self) -> None:
        """After a failure: release, take off the adapter that was added, and undo all casts."""
        self.release()
        if self._added:
            self.policy = detach(self.policy)
            self._added = False
        for parameter, dtype in self._dtypes.items():
            parameter.data = parameter.data.to(dtype)
