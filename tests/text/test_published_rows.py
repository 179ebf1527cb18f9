"""Rows as published data has them, and what templates make of them."""

from __future__ import annotations

import pytest

from alignkit.errors import DataError
from alignkit.options import TextOptions
from tests.builders import TEMPLATE, text_wing, tiny_tokenizer
from tests.text.test_data import CHAT, PLAIN, ids, one, read, turn

FULL = {
    "chosen": [*CHAT["prompt"], *CHAT["chosen"]],
    "rejected": [*CHAT["prompt"], *CHAT["rejected"]],
}


@pytest.mark.parametrize("prompt", [CHAT["prompt"], "the sky?", None])
def test_answers_that_repeat_the_conversation_are_not_given_it_twice(prompt) -> None:
    """As in UltraFeedback: a prompt column beside answers that are whole conversations."""
    assert one({**FULL, "prompt": prompt}) == one(CHAT)


def test_a_string_prompt_and_messages_for_answers() -> None:
    assert one({**CHAT, "prompt": "the sky?"}) == one(CHAT)
    system = [turn("system", "be kind")]
    told = {side: [*system, *FULL[side]] for side in ("chosen", "rejected")}
    prompt, chosen, _ = one({**told, "prompt": "the sky?"})
    assert prompt == ids("<|im_start|>system\nbe kind<|im_end|>\n") + one(CHAT)[0]
    assert chosen == one(CHAT)[1]


@pytest.mark.parametrize("role", ["user", "system"])
def test_what_a_user_says_is_no_answer(role) -> None:
    with pytest.raises(DataError, match=f"chosen begins with a {role}'s message"):
        one({**CHAT, "chosen": [turn(role, "blue"), turn("assistant", "red")]})


@pytest.mark.parametrize("tools", [[{"name": "weather"}], '[{"name": "weather"}]'])
def test_tools_reach_the_template(tools) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if tools %}{{ tools[0].name }} {% endif %}" + TEMPLATE
    prompt, chosen, _ = one({**CHAT, "tools": tools}, tokenizer)
    assert prompt == ids("weather <|im_start|>user\nthe sky?<|im_end|>\n<|im_start|>assistant\n")
    assert chosen == one(CHAT)[1]
    assert one({**CHAT, "tools": None}, tokenizer) == one(CHAT)
    with pytest.raises(DataError, match="tools must be a list or its JSON"):
        one({**CHAT, "tools": "weather("}, tokenizer)


def test_what_a_template_refuses_is_a_bad_row() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(DataError, match="refuses the conversation: no such role"):
        one(CHAT, tokenizer)
    skipped = read([CHAT], tokenizer, on_bad_row="skip").skipped
    assert skipped == {"the chat template refuses the conversation": 1}


def test_half_a_surrogate_pair_is_a_bad_row() -> None:
    with pytest.raises(DataError, match="half a surrogate pair"):
        one({**PLAIN, "chosen": " blue \ud83d"})


def test_a_template_that_opens_answers_otherwise_is_told_of(caplog) -> None:
    """It asks for an answer with a thought, and shows answers without: the thought is no prompt."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("assistant\n{%", "assistant\n<think>{%")
    assert one(CHAT, tokenizer) == one(CHAT)
    assert "in 1 rows the chat template asks for an answer in other words" in caplog.text


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (CHAT, CHAT["prompt"]),
        (FULL, CHAT["prompt"]),
        (PLAIN, PLAIN["prompt"]),
        ({"chosen": "the sky is blue", "rejected": "the sky is black"}, "the sky is "),
        ({"chosen": "Human: hi AI: yes", "rejected": "Human: hi AI: no"}, "Human: hi AI: "),
        ({"chosen": "blue", "rejected": "a fox"}, None),
        ({"prompt_ids": ids("the sky is"), "chosen_ids": [7], "rejected_ids": [8]}, "the sky is"),
    ],
)
def test_the_report_samples_what_the_rows_ask(row, prompt) -> None:
    found = text_wing().prompts([row], TextOptions(), 4)
    assert found == ([] if prompt is None else [prompt])
    assert all(text_wing().prompt_text(one) for one in found)
