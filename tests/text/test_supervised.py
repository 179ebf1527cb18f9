"""Demonstrations: which tokens of which rows are learned."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from alignkit import DataError, TextOptions
from alignkit.text.examples import TextExamples
from tests.builders import TEMPLATE, text_wing, tiny_tokenizer

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the sky?"},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "And tea?"},
    {"role": "assistant", "content": "Boil water."},
]
ANSWERS = "Blue.<|im_end|>\nBoil water.<|im_end|>\n"
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}Let me think. {% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read(
    rows: list[dict[str, Any]],
    loss_on: str = "completion",
    template: str = TEMPLATE,
    tokenizer: Any = None,
    **options: Any,
) -> tuple[Any, TextExamples]:
    """The tokenizer and the examples that it makes of the rows."""
    wing = text_wing("llama")
    wing.tokenizer = tokenizer or tiny_tokenizer()
    wing.tokenizer.chat_template = template
    given = TextOptions(**options)
    return wing.tokenizer, wing.examples(rows, given, kind="supervised", seed=0, loss_on=loss_on)


def parts(row: Any, tokenizer: Any) -> tuple[str, str, str]:
    """Prompt, answer, and what of the answer is learned."""
    (answer,) = row.answers
    scored = row.scored[0] if row.scored else np.ones(len(answer), dtype=bool)
    assert len(scored) == len(answer) and scored[0] and scored[-1] and len(row.prompt) > 0
    return tuple(tokenizer.decode(ids) for ids in (row.prompt, answer, answer[scored]))


def learned(rows: list[dict[str, Any]], loss_on: str, **given: Any) -> list[tuple[str, str, str]]:
    tokenizer, examples = read(rows, loss_on, **given)
    return [parts(row, tokenizer) for row in examples.rows]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["boundaries", "marks"])
def test_the_assistant_s_turns(template) -> None:
    """By token boundaries, and by the template's own marks, which leave out the line's end."""
    ((prompt, answer, scored),) = learned([{"messages": TALK}], "assistant", template=template)
    assert prompt.endswith("What is the sky?<|im_end|>\n<|im_start|>assistant\n")
    assert answer.startswith("Blue.<|im_end|>\n<|im_start|>user\nAnd tea?")
    wanted = ANSWERS if template == TEMPLATE else ANSWERS.replace("\n", "")
    assert scored == wanted


def test_turns_of_prompt_and_completion_are_those_of_the_conversation() -> None:
    parted = [{"prompt": TALK[:4], "completion": TALK[4:]}]
    assert learned(parted, "assistant") == learned([{"messages": TALK}], "assistant")


def test_a_turn_of_calls_between_others() -> None:
    """The assistant, a tool, the assistant again: two turns, and the tool's is context."""
    talk = [*TALK[:2], TALK[2], {"role": "tool", "content": "42"}, TALK[4]]
    ((_, answer, scored),) = learned([{"messages": talk}], "assistant")
    assert "tool\n42" in answer and scored == ANSWERS


def test_the_last_turn_and_all_of_it() -> None:
    ((prompt, answer, scored),) = learned([{"messages": TALK}], "completion")
    assert prompt.endswith("And tea?<|im_end|>\n<|im_start|>assistant\n")
    assert answer == scored == "Boil water.<|im_end|>\n"
    ((prompt, answer, scored),) = learned([{"messages": TALK}], "all")
    assert prompt == "<|im_start|>" and answer == scored and scored.startswith("system\nBe brief")


@pytest.mark.parametrize("bos", [False, True])
def test_prompt_and_completion_as_text(bos) -> None:
    rows = [{"prompt": "The sky is", "completion": " blue."}]
    tokenizer = tiny_tokenizer(bos=bos)
    ((prompt, answer, _),) = learned(rows, "completion", tokenizer=tokenizer)
    assert (prompt, answer) == (f"{'<bos>' * bos}The sky is", " blue.<|im_end|>")
    ((prompt, answer, _),) = learned(rows, "all", tokenizer=tokenizer)
    assert prompt + answer == f"{'<bos>' * bos}The sky is blue.<|im_end|>"
    assert not bos or prompt == "<bos>"


@pytest.mark.parametrize("bos", [False, True])
def test_plain_text_is_learned_but_for_its_first_token(bos) -> None:
    text = "The red fox lives in the forest."
    tokenizer, examples = read([{"text": text}], tokenizer=tiny_tokenizer(bos=bos))
    (row,) = examples.rows
    assert len(row.prompt) == 1 and not examples.chat
    prompt, answer, scored = parts(row, tokenizer)
    assert prompt + answer == f"{'<bos>' * bos}{text}<|im_end|>" and answer == scored


def test_ids_are_taken_as_they_are() -> None:
    rows = [{"prompt_ids": [5, 6], "completion_ids": [7, 8, 9]}]
    for loss_on, prompt, answer in (("completion", [5, 6], [7, 8, 9]), ("all", [5], [6, 7, 8, 9])):
        _, examples = read(rows, loss_on)
        (row,) = examples.rows
        assert row.prompt.tolist() == prompt and row.answers[0].tolist() == answer


def test_tools_reach_the_template() -> None:
    template = "{% if tools %}[{{ tools[0].name }}]{% endif %}" + TEMPLATE
    for loss_on in ("completion", "all", "assistant"):
        rows = [{"messages": TALK, "tools": '[{"name": "search"}]'}]
        ((prompt, answer, _),) = learned(rows, loss_on, template=template)
        assert (prompt + answer).startswith("[search]<|im_start|>system")


def test_a_template_that_rewrites_earlier_turns_is_a_bad_row() -> None:
    rows = [{"messages": TALK}, {"messages": TALK[:3]}]
    with pytest.raises(DataError, match=r"Row 0 .*message 2 otherwise once others follow it"):
        read(rows, "assistant", template=FORGETFUL)
    tokenizer, examples = read(rows, "assistant", template=FORGETFUL, on_bad_row="skip")
    (row,) = examples.rows  # of one turn, nothing is rewritten
    assert parts(row, tokenizer)[2] == "Let me think. Blue.<|im_end|>\n"
    assert sum(examples.skipped.values()) == 1


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": TALK[:2]}, "assistant", "no message of the assistant"),
    ({"messages": TALK[:4]}, "completion", "does not end with a message of the assistant"),
    ({"messages": TALK[2:]}, "assistant", "begins with the assistant"),
    ({"messages": []}, "all", "non-empty list of messages"),
    ({"text": "  "}, "completion", "text is empty"),
    ({"text": 3}, "completion", "text must be a string"),
    ({"prompt": "a", "completion": ""}, "completion", "completion is empty"),
    ({"text": "the sky"}, "assistant", "Write loss_on='completion' or 'all'"),
    ({"prompt": "a", "completion": "b"}, "assistant", "a row has no messages"),
    ({"chosen": "a", "rejected": "b"}, "completion", "They are the columns of pairs"),
    ({"text": "the sky", "weight": -1}, "completion", "weight is a finite number"),
    ({"text": "the sky", "margin": 1}, "completion", "margin"),
    ({"text": "the sky", "image": "x"}, "completion", "vision-language"),
]


@pytest.mark.parametrize(("row", "loss_on", "message"), BAD, ids=lambda v: str(v)[:40])
def test_rows_that_cannot_be_used(row, loss_on, message) -> None:
    with pytest.raises(DataError, match=message):
        read([row], loss_on)


LONG = "The red fox lives in the forest near the river. " * 6


def test_long_texts_are_split_and_each_token_learned_once() -> None:
    tokenizer, examples = read(
        [{"text": LONG}, {"text": "the sky"}], truncation="split", max_length=16
    )
    whole = [*tokenizer(LONG)["input_ids"], tokenizer.eos_token_id]
    pieces = [row for row in examples.rows if row.number == 0]
    assert [token for row in pieces for token in row.answers[0]] == whole[1:]
    lengths = [len(row.prompt) + len(row.answers[0]) for row in pieces]
    assert len(pieces) == -(-(len(whole) - 1) // 15) and max(lengths) == 16 >= min(lengths) >= 2
    assert all(len(row.prompt) == 1 for row in pieces) and len(examples.rows) == len(pieces) + 1
    for before, after in pairwise(pieces):
        assert before.answers[0][-1] == after.prompt[0]


def test_other_rows_are_not_split() -> None:
    for rows in ([{"messages": TALK}], [{"prompt": "a", "completion": "b"}]):
        with pytest.raises(DataError, match="a prompt would be missing"):
            read(rows, truncation="split")


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_truncation_is_counted(truncation, caplog) -> None:
    whole = parts(*_one([{"text": LONG}]))[1]
    tokenizer, examples = read([{"text": LONG}], truncation=truncation, max_length=16)
    (row,) = examples.rows
    found = parts(row, tokenizer)[1]
    assert len(row.prompt) + len(row.answers[0]) == 16
    assert whole.startswith(found) if truncation == "keep_start" else whole.endswith(found)
    assert "1 rows were longer than max_length=16" in caplog.text


def _one(rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    tokenizer, examples = read(rows, max_length=4096)
    return examples.rows[0], tokenizer


def test_what_is_cut_of_answers_and_conversations() -> None:
    """A prompt loses its start, an answer its end; a conversation its first turns."""
    rows = [{"prompt": LONG, "completion": " The sky is blue."}]
    tokenizer, examples = read(rows, truncation="keep_end", max_length=24)
    assert parts(examples.rows[0], tokenizer)[1] == " The sky is blue.<|im_end|>"
    tokenizer, examples = read(
        [{"messages": TALK}], "assistant", truncation="keep_end", max_length=24
    )
    assert parts(examples.rows[0], tokenizer)[2].endswith("Boil water.<|im_end|>\n")
    for given, loss_on in ((rows, "completion"), ([{"messages": TALK}], "assistant")):
        with pytest.raises(DataError, match="leaves no room for an answer below max_length 6"):
            read(given, loss_on, max_length=6)
        with pytest.raises(DataError, match="above max_length 6"):
            read(given, loss_on, max_length=6, truncation="error")


def test_the_prompts_of_samples() -> None:
    wing = text_wing("llama")
    rows = [{"messages": TALK}, {"messages": TALK[:3]}, {"text": "the sky"}]
    assert wing.prompts(rows, TextOptions(), 8) == [TALK[:4], TALK[:2]]
