"""A language model with one free logit per answer: its optimum under a loss has a closed form.

    log p(answer | prompt) = table[prompt, answer] - logsumexp(table[prompt])

It is a real causal LM. The logit of a next token is the log of the summed weight of all answers
that go on with it, so that the token log-probs of an answer add up to the line above whatever the
answers' lengths and common beginnings.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutput

PAD, EOS = 0, 1
IMPOSSIBLE = -1e4
"""Logit of a token that no answer has there: probability 0 in float32, and finite to derive."""


class TabularConfig(PretrainedConfig):
    """
    Attributes:
        vocab_size: tokens, pad and eos among them.
        prompts: the tokens that are prompts.
        answers: the tokens of every answer, the closing eos among them.
    """

    model_type = "alignkit_tabular"

    def __init__(
        self,
        vocab_size: int = 4,
        prompts: Sequence[int] = (2,),
        answers: Sequence[Sequence[int]] = ((3, EOS),),
        **more: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.prompts = list(prompts)
        self.answers = [list(answer) for answer in answers]
        super().__init__(**{"pad_token_id": PAD, "eos_token_id": EOS, **more})


class TabularLM(PreTrainedModel, GenerationMixin):
    """`table` has a row per token; those of the prompts are the model."""

    config_class = TabularConfig

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, len(config.answers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        """Logits (N, S, V) of the next token after every position; what stands before the prompt
        says nothing, and so the mask does not."""
        places = [self._follow(ids) for ids in input_ids.tolist()]
        prompt, node = torch.tensor(places).unbind(1)  # (N, S) each
        free = self.table(prompt.to(input_ids.device)).unsqueeze(2)  # (N, S, 1, A)
        going_on = self._going_on[node].to(input_ids.device)  # (N, S, V, A)
        return CausalLMOutput(logits=free.masked_fill(~going_on, IMPOSSIBLE).logsumexp(-1))

    def _follow(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """The prompt, and the beginning of an answer, that each position of a row has reached."""
        prompts, nodes = [], []
        prompt, said = self.config.prompts[0], ()
        for token in ids:
            prompt, said = (token, ()) if token in self.config.prompts else (prompt, (*said, token))
            prompts.append(prompt)
            nodes.append(self._beginnings.get(said, len(self._beginnings)))
        return prompts, nodes

    @cached_property
    def _beginnings(self) -> dict[tuple[int, ...], int]:
        """All beginnings of answers, numbered."""
        found = {tuple(a[:length]) for a in self.config.answers for length in range(len(a))}
        return {said: number for number, said in enumerate(sorted(found))}

    @cached_property
    def _going_on(self) -> Tensor:
        """(beginnings + 1, V, A) bool: whether an answer has that beginning and then that token.

        The last row is for what begins no answer, such as the padding after one.
        """
        answers = self.config.answers
        size = (len(self._beginnings) + 1, self.config.vocab_size, len(answers))
        going_on = torch.zeros(size, dtype=torch.bool)
        for number, answer in enumerate(answers):
            for place, token in enumerate(answer):
                going_on[self._beginnings[tuple(answer[:place])], token, number] = True
        return going_on

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}


AutoConfig.register(TabularConfig.model_type, TabularConfig)
AutoModelForCausalLM.register(TabularConfig, TabularLM)


def word_tokenizer(words: Sequence[str]) -> Any:
    """A token per word, pad and eos before them."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def tabular_lm(
    prompts: Sequence[str], answers: Sequence[str], probabilities: Sequence[Sequence[float]]
) -> tuple[TabularLM, Any]:
    """A tabular LM and its tokenizer.

    Args:
        prompts: one word each.
        answers: one or more words each, the same for all prompts.
        probabilities: of each answer, for each prompt.
    """
    words = list(dict.fromkeys([*prompts, *(word for a in answers for word in a.split())]))
    tokenizer = word_tokenizer(words)
    config = TabularConfig(
        len(words) + 2,
        [tokenizer.convert_tokens_to_ids(prompt) for prompt in prompts],
        [[*tokenizer(answer)["input_ids"], EOS] for answer in answers],
    )
    model = TabularLM(config)
    with torch.no_grad():
        model.table.weight.zero_()
        model.table.weight[config.prompts] = torch.tensor(probabilities).log()
    return model, tokenizer


@torch.no_grad()
def probabilities_of(model: TabularLM) -> list[list[float]]:
    """Of each answer, for each prompt."""
    return model.table.weight[model.config.prompts].double().softmax(-1).tolist()
