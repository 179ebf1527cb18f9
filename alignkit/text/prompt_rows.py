"""Rows that ask and hold no answer: the prompts of online methods, with all that a reward wants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignkit.columns import BadRow
from alignkit.labels import Label, weight_of
from alignkit.text.content import Ids
from alignkit.text.encoding import TokensOf
from alignkit.text.examples import TokenRow
from alignkit.text.formats import (
    Rendered,
    encodable,
    is_messages,
    messages_of,
    prompt_of,
    render,
    told_of,
)
from alignkit.text.tokens import PAIR_IDS, Limits, Splitter, ids_of


@dataclass(frozen=True)
class Question:
    """A prompt on its way to ids.

    Attributes:
        texts: the rendered prompt and no answer; None if it is ids already.
        ids: the prompt's, where the row gave them.
        source: the row as the data gave it, its `prompt` as it is asked.
    """

    texts: Rendered | None
    ids: Ids | None
    source: Mapping[str, Any]

    def row(self, number: int, splitter: Splitter, tokens: TokensOf, limits: Limits) -> TokenRow:
        """The prepared row, whose prompt leaves room for an answer.

        Raises:
            BadRow: if it leaves none.
        """
        ids = splitter.asked(self.texts, tokens) if self.texts is not None else self.ids
        assert ids is not None
        prompt = limits.cut_prompt(splitter.begun(ids))
        return TokenRow(number, prompt, (), source=self.source)


def read_question(tokenizer: Any, row: Mapping[str, Any]) -> tuple[Question, Label]:
    """What a row asks: by `prompt` (a string or messages), `prompt_ids`, the `messages` before the
    assistant's last turn, or what its `chosen` and `rejected` have in common. Answers are left
    aside. Strings are taken as they are; messages are rendered by the chat template.

    Args:
        tokenizer: its chat template renders messages.
        row: with `tools` and `chat_template_kwargs` for the template, and whatever rewards read.

    Raises:
        BadRow: if it asks nothing.
    """
    label = Label((), numbers=weight_of(row))
    given = PAIR_IDS[0] in row and row.get("prompt") is None
    ids = ids_of(row, PAIR_IDS[0]) if given else None
    prompt = prompt_of(tokenizer, row)
    source = {**row, "prompt": prompt}
    if ids is not None:
        return Question(None, ids, source), label
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        raise BadRow("there is no prompt")
    if isinstance(prompt, str):
        return Question(encodable(Rendered(prompt, (), chat=False)), None, source), label
    if not is_messages(prompt):
        kind = type(prompt).__name__
        raise BadRow("bad prompt", f"prompt must be a string or a list of messages; got {kind}")
    messages = messages_of(prompt, "prompt")
    if messages[-1]["role"] == "assistant":
        raise BadRow("the prompt ends with an assistant message; an answer must follow a user's")
    text = render(tokenizer, messages, generation_prompt=True, told=told_of(row))
    return Question(encodable(Rendered(text, (), chat=True)), None, source), label
