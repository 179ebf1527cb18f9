"""Rows that ask and hold no answer: every shape of a prompt, what rewards see of the row, limits,
mixtures and streams."""

from __future__ import annotations

import json
import logging
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignkit.errors import CheckpointError, ConfigError, DataError
from alignkit.mixtures import Mixture
from alignkit.options import TextOptions
from alignkit.sources import RowSource
from alignkit.stream_source import StreamSource
from alignkit.text.prompts import prompt_ids
from alignkit.text.row_kinds import LAYOUTS
from tests.builders import text_wing, tiny_tokenizer
from tests.text.test_data import CHAT, EOS, ids, read, turn

HH = "\n\nHuman: the sky?\n\nAssistant: "
ASKED = "<|im_start|>user\nthe sky?<|im_end|>\n<|im_start|>assistant\n"
ALONE = SimpleNamespace(rank=0, size=1)


def asked(row: dict[str, Any], **options: Any) -> tuple[list[int], dict[str, Any]]:
    """Ids of the prompt of a single row, and the row that rewards see."""
    examples = read([row], kind="prompts", **options)
    batch = examples.collate([0], [0])
    assert batch.num_answers == 0 and batch.num_groups == 1
    assert batch.rows is not None
    (prompt,), (source,) = batch.content.prompts, batch.rows
    return prompt.tolist(), dict(source)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "the sky is"}, "the sky is"),
        ({"prompt": CHAT["prompt"]}, ASKED),
        ({"messages": [*CHAT["prompt"], turn("assistant", "blue")]}, ASKED),
        (CHAT, ASKED),
        ({"prompt_ids": [7, 8, 9]}, None),
        ({"chosen": "the sky is blue", "rejected": "the sky is grey"}, "the sky is "),
        (
            {"chosen": [*CHAT["prompt"], turn("assistant", "a")], "rejected": CHAT["prompt"] * 2},
            ASKED,
        ),
        ({"chosen": f"{HH}a", "rejected": f"{HH}b"}, ASKED),
    ],
    ids=["string", "messages", "demonstration", "pair", "ids", "shared", "shared turns", "hh-rlhf"],
)
def test_what_a_row_asks(row: dict[str, Any], text: str | None) -> None:
    prompt, source = asked(row)
    assert prompt == (ids(text) if text is not None else [7, 8, 9])
    assert source["prompt"]


def test_a_prompt_of_training_is_that_of_sampling() -> None:
    for bos in (False, True):
        tokenizer = tiny_tokenizer(bos=bos)
        for prompt in ("the sky is", CHAT["prompt"], "<bos>the sky is"):
            (row,) = read([{"prompt": prompt}], tokenizer, kind="prompts").rows
            (expected,) = prompt_ids(tokenizer, [prompt], chat=False)
            assert row.prompt.tolist() == expected.tolist()
            assert row.prompt[-1] != EOS or prompt == CHAT["prompt"]


def test_rewards_see_the_row_as_it_was() -> None:
    row = {**CHAT, "tags": ["safety"], "rules": {"no lies": 1}, "answer": "42", "weight": 2}
    _, source = asked(row)
    assert source == row
    batch = read([row, {"prompt": "the sky"}], kind="prompts").collate([1, 0], [0, 0])
    assert batch.weight.tolist() == [1, 2] and batch.rows[1]["answer"] == "42"
    assert batch.select([1]).rows == batch.rows[1:] and batch.select([1]).num_answers == 0


def test_tools_reach_the_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson }}{{ mood }}{{ messages[0].content }}"
    row = {
        "prompt": CHAT["prompt"],
        "tools": json.dumps([{"name": "look"}]),
        "chat_template_kwargs": {"mood": "calm"},
    }
    (found,) = read([row], tokenizer, kind="prompts").rows
    assert tokenizer.decode(found.prompt) == '[{"name": "look"}]calmthe sky?'


def test_strings_beside_a_template_are_told_of(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, logger="alignkit"):
        read([{"prompt": "the sky is"}], kind="prompts")
        read([{"prompt": "the sky is"}], tiny_tokenizer(chat=False), kind="prompts")
        read([{"prompt": CHAT["prompt"]}], kind="prompts")
    assert [r.getMessage()[:45] for r in caplog.records] == [
        "the given list: the prompts are strings, whic"
    ]


def test_a_prompt_leaves_room_for_its_answer() -> None:
    wing, long = text_wing("qwen2"), {"prompt_ids": [5] * 30}

    def prompt(room: int, **options: Any) -> list[int]:
        given = TextOptions(**options)
        return wing.examples([long], given, kind="prompts", seed=0, room=room).rows[0].prompt

    assert len(prompt(10, max_length=40)) == 30
    with pytest.raises(DataError, match=r"no room for an answer below max_length 40.*up to 11"):
        prompt(11, max_length=40)
    assert len(prompt(11, max_length=40, truncation="keep_end")) == 29
    with pytest.raises(ConfigError, match=r"max_new_tokens=40. Set data_options.max_length above"):
        prompt(40, max_length=40)
    with pytest.raises(ConfigError, match="longest row has 257 tokens, and the model has 256"):
        prompt(227)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": " "}, "there is no prompt"),
        ({"prompt": None, "answer": "4"}, "there is no prompt"),
        ({"prompt": 7}, "a string or a list of messages; got int"),
        ({"prompt": [*CHAT["prompt"], turn("assistant", "blue")]}, "ends with an assistant"),
        ({"prompt_ids": [1, -1]}, "integers of at least 0"),
        ({"question": "the sky?"}, "have the columns prompt, or .* Rename"),
        ({"prompt": "half a pair \ud800"}, "half a surrogate"),
    ],
)
def test_rows_that_ask_nothing_are_refused(row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read([row], kind="prompts")


def prompts(num: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"prompt_ids": [10 + first + i, 4], "answer": str(first + i)} for i in range(num)]


def numbers(batch: Any) -> list[str]:
    return [row["answer"] for row in batch.rows]


def test_changed_ground_truth_is_other_data() -> None:
    wing = text_wing("qwen2")

    def source(data: Any) -> RowSource:
        examples = wing.examples(data, TextOptions(), kind="prompts", seed=0)
        return RowSource(examples, batch_size=3, epochs=None, seed=0, processes=ALONE)

    state = source(prompts(5)).state_dict()
    source(prompts(5)).load_state_dict(state)
    with pytest.raises(CheckpointError, match="contents have changed"):
        source([*prompts(4), {**prompts(1, 4)[0], "answer": "9"}]).load_state_dict(state)


def test_mixtures_and_streams_hold_the_same_rows_and_resume(tmp_path: Path) -> None:
    wing, sets = text_wing("qwen2"), {}
    for name, rows in {"a": prompts(7), "b": prompts(5, 50)}.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sets[str(path)] = 1.0
    common: dict[str, Any] = {"batch_size": 4, "seed": 1}

    def mixed(processes: Any = ALONE) -> RowSource:
        data = wing.examples(Mixture(sets), TextOptions(), kind="prompts", seed=0, room=8)
        return RowSource(data, epochs=None, processes=processes, **common)

    def streamed(processes: Any = ALONE) -> StreamSource:
        opened = {p: wing.stream(p, TextOptions(), kind="prompts", room=8) for p in sets}
        return StreamSource(opened, weights=sets, buffer=4, processes=processes, **common)

    everything = {row["answer"] for row in (*prompts(7), *prompts(5, 50))}
    for make in (mixed, streamed):
        whole = list(islice(make(), 12))
        seen = [name for batch in whole for name in numbers(batch)]
        assert set(seen) == everything
        assert all(
            prompt.tolist() == [10 + int(name), 4]
            for batch in whole
            for prompt, name in zip(batch.content.prompts, numbers(batch), strict=True)
        )
        first, second = make(), make()
        list(islice(first, 5))
        second.load_state_dict(first.state_dict())
        rest = [name for batch in islice(second, 7) for name in numbers(batch)]
        assert rest == seen[20:]
        halves = [list(islice(make(SimpleNamespace(rank=r, size=2)), 3)) for r in range(2)]
        both = [numbers(one) + numbers(two) for one, two in zip(*halves, strict=True)]
        assert both == [numbers(batch) for batch in whole[:3]]
        assert torch.equal(halves[1][0].position, torch.tensor([2, 3]))


def test_prompts_are_the_last_kind_that_columns_tell() -> None:
    from alignkit.doctor import examine

    assert list(LAYOUTS)[-1] == "prompts"
    report = examine([{"prompt": "a"}, {"prompt": "b c"}, {"prompt": ""}], modality="text")
    assert report.kind == "prompts to answer" and report.facts["usable"] == 2
    assert examine([CHAT], modality="text").kind == "pairs"
