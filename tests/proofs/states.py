"""A language model with free logits in every state: prompt and what has been said so far.

    ln p(token | prompt, said) = log softmax(head column of that state)[token]

Its trunk says which state a text is in, as a one-hot vector, and its head is linear: so a policy
gradient is tabular, and so is a critic, which is the same trunk with a head of one output. It is a
real causal LM with a class for sequence classification beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from tests.proofs.tabular import EOS, IMPOSSIBLE, PAD, word_tokenizer

Probabilities = Mapping[str, Mapping[tuple[str, ...], float]]
"""Prompt -> answer, in words -> its probability."""


class StatesConfig(PretrainedConfig):
    """
    Attributes:
        following: state -> token -> the state after it; 0 is everywhere and nowhere.
    """

    model_type = "alignkit_states"

    def __init__(
        self, vocab_size: int = 4, following: Sequence[Sequence[int]] = ((0,) * 4,), **more: Any
    ) -> None:
        self.vocab_size = vocab_size
        self.following = [list(row) for row in following]
        self.hidden_size = len(self.following)
        super().__init__(**{"pad_token_id": PAD, "eos_token_id": EOS, **more})


class States(PreTrainedModel):
    """Texts to one-hot states. It has a weight, which nothing depends on."""

    config_class = StatesConfig
    base_model_prefix = "model"

    def __init__(self, config: StatesConfig) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, 1)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutput:
        """(N, S, states). Padding in front leads from state 0 to state 0."""
        following = torch.tensor(self.config.following, device=input_ids.device)
        state, states = torch.zeros_like(input_ids[:, 0]), []
        for tokens in input_ids.unbind(1):
            state = following[state, tokens]
            states.append(state)
        one_hot = nn.functional.one_hot(torch.stack(states, 1), self.config.hidden_size)
        return BaseModelOutput(last_hidden_state=one_hot.float())


class StatesForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = StatesConfig
    base_model_prefix = "model"

    def __init__(self, config: StatesConfig) -> None:
        super().__init__(config)
        self.model = States(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.tokens

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        hidden = self.model(input_ids, attention_mask).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(hidden))

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}


class StatesForSequenceClassification(PreTrainedModel):
    config_class = StatesConfig
    base_model_prefix = "model"

    def __init__(self, config: StatesConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = States(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.tokens

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        return self.score(self.model(input_ids, attention_mask).last_hidden_state)


AutoConfig.register(StatesConfig.model_type, StatesConfig)
AutoModelForCausalLM.register(StatesConfig, StatesForCausalLM)
AutoModelForSequenceClassification.register(StatesConfig, StatesForSequenceClassification)


def _begun(probabilities: Probabilities) -> list[tuple[str, ...]]:
    """All states, in words: a prompt, and what an answer may have said after it."""
    found = [
        (prompt, *answer[:length])
        for prompt, answers in probabilities.items()
        for answer in answers
        for length in range(len(answer) + 1)
    ]
    return list(dict.fromkeys(found))


def states_lm(probabilities: Probabilities) -> tuple[StatesForCausalLM, Any]:
    """The language model that answers as said, each answer closed by eos; and its tokenizer."""
    spoken = [word for answers in probabilities.values() for answer in answers for word in answer]
    words = list(dict.fromkeys([*probabilities, *spoken]))
    tokenizer = word_tokenizer(words)
    token = {word: number + 2 for number, word in enumerate(words)}
    places = {said: number + 1 for number, said in enumerate(_begun(probabilities))}
    size = len(words) + 2
    following = [[0] * size for _ in range(len(places) + 1)]
    for said, place in places.items():
        for row in following if len(said) == 1 else [following[places[said[:-1]]]]:
            row[token[said[-1]]] = place
    model = StatesForCausalLM(StatesConfig(size, following))
    with torch.no_grad():
        model.lm_head.weight.fill_(IMPOSSIBLE)
        model.lm_head.weight[:, 0] = 0.0
        for said, place in places.items():
            for word, chance in _next(probabilities[said[0]], said[1:]).items():
                row = EOS if word is None else token[word]
                model.lm_head.weight[row, place] = torch.tensor(chance).log()
    return model, tokenizer


def _next(answers: Mapping[tuple[str, ...], float], said: tuple[str, ...]) -> dict[Any, float]:
    """What may come next and how likely it is; None is the end."""
    mass: dict[Any, float] = {}
    for answer, chance in answers.items():
        if answer[: len(said)] == said:
            word = answer[len(said)] if len(answer) > len(said) else None
            mass[word] = mass.get(word, 0.0) + chance
    return {word: chance / sum(mass.values()) for word, chance in mass.items()}


@torch.no_grad()
def answers_of(model: Any, tokenizer: Any, probabilities: Probabilities) -> dict[str, list[float]]:
    """Prompt -> the probability of each answer, from the model's own logits, in float64."""
    found: dict[str, list[float]] = {}
    for prompt, answers in probabilities.items():
        found[prompt] = []
        for answer in answers:
            ids = [*tokenizer.convert_tokens_to_ids([prompt, *answer]), EOS]
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
            logps = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
            found[prompt].append(float(logps.sum().exp()))
    return found
