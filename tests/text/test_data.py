"""Text rows: every accepted shape, the boundary, the limits, and what is refused in which words."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignkit.errors import ConfigError, DataError
from alignkit.options import TextOptions
from alignkit.rows import read_rows
from alignkit.text.data import read_examples
from alignkit.text.examples import TextExamples
from tests.builders import pair_rows, text_wing, tiny_tokenizer

EOS, BOS = 3, 1


def read(rows: Any, tokenizer: Any = None, kind: str = "pairs", **options: Any) -> TextExamples:
    opened = read_rows(rows, columns=options.get("columns", {}))
    return read_examples(opened, tokenizer or tiny_tokenizer(), TextOptions(**options), kind)


def one(row: dict[str, Any], tokenizer: Any = None, **options: Any) -> tuple[list[int], ...]:
    """The ids of a single row: of its prompt and of its answers."""
    (found,) = read([row], tokenizer, **options).rows
    return found.prompt.tolist(), *(answer.tolist() for answer in found.answers)


def ids(text: str) -> list[int]:
    """Token ids of plain text, special tokens written out recognised and none added."""
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def flat(examples: TextExamples) -> list[list[int]]:
    return [ids.tolist() for row in examples.rows for ids in (row.prompt, *row.answers)]


CHAT = {
    "prompt": [turn("user", "the sky?")],
    "chosen": [turn("assistant", "blue")],
    "rejected": [turn("assistant", "a fox")],
}
PLAIN = {"prompt": "the sky is", "chosen": " blue", "rejected": " grey and blue"}


# ---- shapes


def test_plain_strings_end_with_one_eos_and_take_no_template() -> None:
    prompt, chosen, rejected = one(PLAIN)
    assert prompt == ids("the sky is")
    assert chosen == [*ids(" blue"), EOS]
    assert rejected == [*ids(" grey and blue"), EOS]


def test_an_eos_that_is_there_is_not_doubled() -> None:
    _, chosen, rejected = one({**PLAIN, "chosen": " blue<|im_end|>"})
    assert chosen == [*ids(" blue"), EOS] and rejected[-1] == EOS


def test_messages_are_rendered_by_the_template_once() -> None:
    prompt, chosen, rejected = one(CHAT)
    assert prompt == ids("<|im_start|>user\nthe sky?<|im_end|>\n<|im_start|>assistant\n")
    assert chosen == ids("blue<|im_end|>\n")
    assert rejected == ids("a fox<|im_end|>\n")


def test_a_string_may_answer_a_conversation() -> None:
    assert one({**CHAT, "chosen": "blue", "rejected": "a fox"}) == one(CHAT)


def test_content_parts_of_text_are_the_text() -> None:
    template = tiny_tokenizer()
    template.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "the sky?"}]}]
    assert one({**CHAT, "prompt": parts}, template) == one(CHAT)


def test_implicit_prompt_of_strings_is_what_the_answers_share() -> None:
    row = {"chosen": "the sky is blue", "rejected": "the sky is grey and blue"}
    prompt, chosen, rejected = one(row)
    assert prompt == ids("the sky is")
    assert chosen == [*ids(" blue"), EOS] and rejected == [*ids(" grey and blue"), EOS]


def test_implicit_prompt_where_one_string_begins_the_other() -> None:
    prompt, chosen, rejected = one({"chosen": "the sky is", "rejected": "the sky is blue"})
    assert (prompt, chosen, rejected) == (ids("the sky is"), [EOS], [*ids(" blue"), EOS])


def test_implicit_prompt_of_messages() -> None:
    row = {
        "chosen": [*CHAT["prompt"], *CHAT["chosen"]],
        "rejected": [*CHAT["prompt"], *CHAT["rejected"]],
    }
    assert one(row) == one(CHAT)


def test_implicit_prompt_where_one_conversation_begins_the_other() -> None:
    longer = [*CHAT["prompt"], *CHAT["chosen"], turn("user", "why?"), turn("assistant", "air")]
    prompt, chosen, rejected = one({"chosen": longer[:2], "rejected": longer})
    assert prompt == one(CHAT)[0] and chosen == one(CHAT)[1]
    more = "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\nair<|im_end|>\n"
    assert rejected == [*chosen, *ids(more)]


def test_implicit_prompt_without_a_shared_part_is_a_bad_row() -> None:
    with pytest.raises(DataError, match="in common"):
        one({"chosen": CHAT["chosen"], "rejected": CHAT["rejected"]})
    for tokenizer in (None, tiny_tokenizer(bos=True)):
        with pytest.raises(DataError, match="in common"):
            one({"chosen": "blue", "rejected": "a fox"}, tokenizer)


def test_rows_of_token_ids_are_taken_as_they_are() -> None:
    row = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9, EOS]}
    assert one(row) == ([5, 6], [7], [8, 9, EOS])
    assert one({k: np.array(v) for k, v in row.items()}) == one(row)
    assert one({k: torch.tensor(v) for k, v in row.items()}) == one(row)


def test_rankings_and_single_answers_of_token_ids_are_taken_as_they_are() -> None:
    row = {"prompt_ids": [5, 6], "responses_ids": [[7], [8, 9], [10]], "scores": [1.0, None, 2.0]}
    (found,) = read([row], kind="groups").rows
    assert found.prompt.tolist() == [5, 6]
    assert [answer.tolist() for answer in found.answers] == [[7], [10]]
    single = {"prompt_ids": [5], "completion_ids": [7, 8], "label": False}
    examples = read([single], kind="unpaired")
    assert examples.rows[0].answers[0].tolist() == [7, 8]
    assert examples.labels.labels[0].desirable is False
    with pytest.raises(DataError, match=r"responses_ids\[0\] must be a non-empty list"):
        read([{**row, "responses_ids": [[], [8], [9]]}], kind="groups")


@pytest.mark.parametrize("bad", [[], [1.5], [[1]], ["a"], None, [-1], [2**40]])
def test_token_ids_that_are_none_are_a_bad_row(bad) -> None:
    row = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": bad}
    with pytest.raises(DataError, match=r"Row 0 .*rejected_ids"):
        one(row)
    assert read([row, {**row, "rejected_ids": [8]}], on_bad_row="skip").rows[0].number == 1


def test_an_id_beyond_the_embeddings_is_refused() -> None:
    rows = [{"prompt_ids": [5], "chosen_ids": [7], "rejected_ids": [100_000]}]
    with pytest.raises(ConfigError, match="100000"):
        text_wing().examples(rows, TextOptions(), kind="pairs", seed=0)


# ---- the boundary between prompt and completion


def test_a_token_that_merges_across_the_boundary_belongs_to_the_completion(caplog) -> None:
    assert ids("fore") + ids("st") != ids("forest"), "the tokenizer no longer merges these"
    with caplog.at_level(logging.WARNING, "alignkit"):
        prompt, chosen, rejected = one(
            {"prompt": "the fore", "chosen": "st", "rejected": "st near the river"}
        )
    shared = 0
    while ids("the fore")[shared] == ids("the forest")[shared]:
        shared += 1
    assert prompt == ids("the forest")[:shared]
    assert prompt + chosen == [*ids("the forest"), EOS]
    assert prompt + rejected == [*ids("the forest near the river"), EOS]
    assert "merges" in caplog.text


def test_without_a_merge_nothing_is_said(caplog) -> None:
    with caplog.at_level(logging.WARNING, "alignkit"):
        read(pair_rows(6))
        for tokenizer in (tiny_tokenizer(), tiny_tokenizer(bos=True), closing_tokenizer()):
            read([PLAIN], tokenizer)
    assert not caplog.text


def closing_tokenizer() -> Any:
    """A tokenizer that appends eos itself, as some do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", EOS)]
    )
    assert tokenizer("blue")["input_ids"][-1] == EOS
    return tokenizer


def test_bos_and_eos_are_there_once_whoever_adds_them() -> None:
    expected = one(PLAIN)
    with_bos = ([BOS, *expected[0]], *expected[1:])
    assert one(PLAIN, tiny_tokenizer(bos=True)) == with_bos
    written = {**PLAIN, "prompt": "<bos>the sky is"}
    assert one(written, tiny_tokenizer(bos=True)) == with_bos
    assert one(PLAIN, closing_tokenizer()) == expected


def test_a_template_that_writes_bos_is_not_given_another() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = "<bos>" + tokenizer.chat_template
    prompt, chosen, _ = one(CHAT, tokenizer)
    assert prompt.count(BOS) == 1 and prompt[0] == BOS and chosen.count(BOS) == 0
    assert chosen == one(CHAT)[1]


@pytest.mark.parametrize(("bos", "context"), [(True, BOS), (False, EOS)])
def test_an_empty_prompt_begins_with_bos_or_eos(bos, context) -> None:
    prompt, chosen, _ = one({**PLAIN, "prompt": ""}, tiny_tokenizer(bos=bos))
    assert prompt == [context] and chosen == [*ids(" blue"), EOS]


# ---- limits


LONG = {"prompt_ids": [10, 11, 12, 13], "chosen_ids": [20, 21, 22], "rejected_ids": [30, 31]}


@pytest.mark.parametrize(
    ("limit", "mode", "expected"),
    [
        (7, "keep_start", ([10, 11, 12, 13], [20, 21, 22], [30, 31])),
        (6, "keep_start", ([10, 11, 12, 13], [20, 21], [30, 31])),
        (5, "keep_start", ([10, 11, 12, 13], [20], [30])),
        (6, "keep_end", ([11, 12, 13], [20, 21, 22], [30, 31])),
        (4, "keep_end", ([13], [20, 21, 22], [30, 31])),
        (3, "keep_end", ([13], [20, 21], [30, 31])),
    ],
)
def test_truncation(limit, mode, expected, caplog) -> None:
    with caplog.at_level(logging.WARNING, "alignkit"):
        assert one(LONG, max_length=limit, truncation=mode) == expected
    assert ("1 rows were longer than max_length" in caplog.text) == (limit < 7)


def test_truncation_is_counted_over_all_rows(caplog) -> None:
    short = {"prompt_ids": [10], "chosen_ids": [20], "rejected_ids": [30]}
    with caplog.at_level(logging.WARNING, "alignkit"):
        assert len(read([LONG, short, LONG, short, LONG], max_length=6)) == 5
    assert "3 rows were longer than max_length=6" in caplog.text
    assert [record.name for record in caplog.records] == ["alignkit"]


def test_truncation_may_be_refused() -> None:
    with pytest.raises(DataError, match="7 tokens, above max_length 6"):
        one(LONG, max_length=6, truncation="error")


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_no_room_for_an_answer_is_a_bad_row_under_both_policies(mode, caplog) -> None:
    limit = 4 if mode == "keep_start" else 1
    with pytest.raises(DataError, match="leaves no room"):
        one(LONG, max_length=limit, truncation=mode)
    with caplog.at_level(logging.WARNING, "alignkit"):
        pairs = read([LONG, LONG], max_length=limit, truncation=mode, on_bad_row="skip")
    assert len(pairs) == 0 and sum(pairs.skipped.values()) == 2
    assert "2 rows left out" in caplog.text


def test_pairs_that_are_identical_only_after_the_cut_count_as_identical() -> None:
    row = {"prompt_ids": [10, 11], "chosen_ids": [20, 21], "rejected_ids": [20, 22]}
    pairs = read([row, LONG], max_length=3, truncation="keep_start", on_bad_row="skip")
    assert pairs.skipped["chosen and rejected are the same"] == 1


@pytest.mark.parametrize("shape", ["chat", "plain", "implicit", "ids"])
def test_identical_pairs_under_three_policies(shape) -> None:
    same, other = {
        "chat": ({**CHAT, "rejected": CHAT["chosen"]}, CHAT),
        "plain": ({**PLAIN, "rejected": PLAIN["chosen"]}, PLAIN),
        "implicit": (
            {"chosen": "the sky is blue", "rejected": "the sky is blue"},
            {"chosen": "the sky is blue", "rejected": "the sky is grey"},
        ),
        "ids": ({**LONG, "rejected_ids": LONG["chosen_ids"]}, LONG),
    }[shape]
    rows = [same, other, same]
    skipped = read(rows)
    assert [row.number for row in skipped.rows] == [1]
    assert skipped.skipped == {"chosen and rejected are the same": 2}
    kept = read(rows, identical_pairs="keep")
    assert len(kept) == 3 and all(flat(kept)), "an answer lost its last token"
    with pytest.raises(DataError, match="Row 0"):
        read(rows, identical_pairs="error")


# ---- rows that cannot be used


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chosen": ""}, "chosen is empty"),
        ({"rejected": "  \n"}, "rejected is empty"),
        ({"chosen": None}, "chosen must be a string"),
        ({"rejected": 3}, "rejected must be a string"),
        ({"prompt": [], "chosen": "a"}, "prompt must be a string or a non-empty list"),
        ({"prompt": CHAT["prompt"], "chosen": []}, "chosen must be a string or a non-empty list"),
        ({"prompt": CHAT["prompt"], "chosen": [turn("assistant", "")]}, "chosen is empty"),
        ({"prompt": CHAT["prompt"], "chosen": [{"content": "x"}]}, "message without a role"),
        ({"prompt": CHAT["prompt"], "chosen": [{"role": "assistant"}]}, "without text"),
        ({"prompt": [*CHAT["prompt"], *CHAT["chosen"]]}, "ends with an assistant message"),
        ({"weight": -1}, "weight is a finite number of at least 0"),
        ({"weight": "heavy"}, "weight is a finite number"),
        ({"weight": True}, "weight is a finite number"),
        ({"weight": "nan"}, "weight is a finite number"),
        ({"weight": float("nan")}, "weight is a finite number"),
        ({"weight": float("inf")}, "weight is a finite number"),
        ({"margin": float("inf")}, "margin is a finite number"),
        ({"margin": [1]}, "margin is a finite number"),
        ({"p_chosen": 1.5}, "p_chosen is a finite number between 0 and 1"),
        ({"p_chosen": -0.1}, "p_chosen is a finite number between 0 and 1"),
    ],
)
def test_a_bad_row_is_named_or_left_out_by_policy(change, words) -> None:
    rows = [PLAIN, {**PLAIN, **change}, PLAIN]
    with pytest.raises(DataError, match=f"Row 1 .*of the given list.*{words}"):
        read(rows)
    pairs = read(rows, on_bad_row="skip")
    assert [row.number for row in pairs.rows] == [0, 2]
    assert list(pairs.skipped.values()) == [1]


@pytest.mark.parametrize(("wrong", "missing"), [("chosn", "chosen"), ("rejectd", "rejected")])
def test_a_missing_column_is_named_with_the_nearest_one(wrong, missing) -> None:
    row = {**PLAIN, wrong: PLAIN[missing]}
    del row[missing]
    with pytest.raises(DataError) as error:
        read([row])
    assert f"{missing!r} is missing" in str(error.value)
    assert f"Did you mean {wrong!r}?" in str(error.value)
    assert f"data_options.columns={{{missing!r}:" in str(error.value)


def test_columns_are_renamed() -> None:
    row = {"question": PLAIN["prompt"], "better": PLAIN["chosen"], "worse": PLAIN["rejected"]}
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    assert one(row, columns=columns) == one(PLAIN)
    with pytest.raises(DataError, match=r"'quest'.*Did you mean 'question'"):
        one(row, columns={**columns, "prompt": "quest"})


@pytest.mark.parametrize(
    "row",
    [
        {**PLAIN, "images": ["a.png"]},
        {**PLAIN, "image": b"png"},
        {**CHAT, "prompt": [{"role": "user", "content": [{"type": "image"}]}]},
    ],
)
def test_rows_with_images_are_refused_even_where_bad_rows_are_skipped(row) -> None:
    with pytest.raises(DataError, match="vision-language policies are not supported"):
        read([row], on_bad_row="skip")


def test_an_empty_image_column_is_no_image() -> None:
    assert one({**PLAIN, "images": []}) == one({**PLAIN, "image": None}) == one(PLAIN)


def test_messages_without_a_chat_template_are_refused_with_the_fix() -> None:
    with pytest.raises(DataError, match=r"tokenizer\.chat_template"):
        read([CHAT], tiny_tokenizer(chat=False))


@pytest.mark.parametrize("data", [[], {}, "nowhere.jsonl", 3])
def test_data_that_is_none_is_refused(data) -> None:
    with pytest.raises(DataError):
        read(data)


# ---- numbers of a row


def test_weight_margin_and_p_chosen_reach_the_batch_with_neutral_gaps() -> None:
    rows = [
        PLAIN,
        {**PLAIN, "weight": 2, "p_chosen": 0.75},
        {**PLAIN, "chosen": ""},
        {**PLAIN, "margin": np.float32(0.5), "weight": None},
        {**PLAIN, "weight": 0.0},
    ]
    batch = read(rows, on_bad_row="skip").collate([3, 0, 1, 2], [0] * 4)
    assert batch.row_id.tolist() == [4, 0, 1, 3]
    assert batch.weight.tolist() == [0, 1, 2, 1]
    assert batch.target_margin.tolist() == [0, 0, 0, 0.5]
    assert batch.p_chosen.tolist() == [1, 1, 0.75, 1]
    assert batch.weight.dtype == torch.float32


def test_without_such_columns_a_batch_has_none() -> None:
    batch = read([PLAIN]).collate([0], [0])
    assert batch.weight is None and batch.target_margin is None and batch.p_chosen is None
    assert batch.weights().tolist() == [1]


# ---- where rows come from


def written(kind: str, rows: list[dict[str, Any]], folder: Path) -> Any:
    import datasets

    if kind == "Dataset":
        return datasets.Dataset.from_list(rows)
    if kind == "IterableDataset":
        return datasets.Dataset.from_list(rows).to_iterable_dataset()
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


FORMS = ("jsonl", "json", "csv", "parquet", "Dataset", "IterableDataset")
CASES = [(kind, chat) for kind in FORMS for chat in (True, False) if (kind, chat) != ("csv", True)]


@pytest.mark.parametrize(("kind", "chat"), CASES)
def test_the_same_rows_from_anywhere_are_the_same_examples(kind, chat, tmp_path) -> None:
    rows = [{**row, "weight": 0.5 + i} for i, row in enumerate(pair_rows(6, chat=chat))]
    expected = read(rows)
    found = read(written(kind, rows, tmp_path))
    assert flat(found) == flat(expected) and found.chat == chat
    assert found.collate(range(6), [0] * 6).weight.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]


def test_a_batch_is_selected_by_group_in_any_order() -> None:
    batch = read(pair_rows(5)).collate(range(5), [0] * 5)
    part = batch.select([3, 0])
    assert part.row_id.tolist() == [3, 0] and part.group.tolist() == [0, 0, 1, 1]
    for new, old in ((0, 3), (1, 0)):
        assert np.array_equal(part.content.prompts[new], batch.content.prompts[old])
        for side in (0, 1):
            ours = part.content.completions[2 * new + side]
            assert np.array_equal(ours, batch.content.completions[2 * old + side])
    assert part.content.owner == (0, 0, 1, 1)
