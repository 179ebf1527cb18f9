"""Rankings and single labelled answers as text rows: the rules of pairs, for any number of
answers."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignkit.errors import ConfigError, DataError
from alignkit.options import TextOptions
from tests.builders import text_wing
from tests.text.test_data import CHAT, EOS, PLAIN, ids, one, read, turn

RANKED = {
    "prompt": "the sky is",
    "responses": [" blue", " grey and blue", " a fox", " near the river"],
    "ranking": [1, 0, 2, 2],
}
SINGLE = {"prompt": "the sky is", "completion": " blue", "label": True}
TALK = {"prompt": CHAT["prompt"], "responses": [CHAT["chosen"], "a fox"], "scores": [0.5, 2]}


def answers(row: dict[str, Any], kind: str, **options: Any) -> list[list[int]]:
    """Ids of the prompt and of the answers of a single row."""
    return [list(part) for part in one(row, kind=kind, **options)]


def batch_of(rows: Any, kind: str, **options: Any) -> Any:
    examples = read(rows, kind=kind, **options)
    return examples.collate(range(len(examples)), [0] * len(examples))


# ---- shapes


def test_a_ranking_is_as_many_answers_to_one_prompt() -> None:
    expected = [ids("the sky is"), *([*ids(text), EOS] for text in RANKED["responses"])]
    assert answers(RANKED, "groups") == expected
    batch = batch_of([RANKED], "groups")
    assert batch.rank.tolist() == [1, 0, 2, 2] and batch.group.tolist() == [0] * 4
    assert batch.score is None and batch.desirable is None
    assert batch.content.owner == (0, 0, 0, 0) and len(batch.content.prompts) == 1


def test_a_ranking_of_two_is_the_pair() -> None:
    pair = {"prompt": PLAIN["prompt"], "responses": [PLAIN["chosen"], PLAIN["rejected"]]}
    assert answers({**pair, "ranking": [0, 1]}, "groups") == [list(p) for p in one(PLAIN)]
    talk = answers(TALK, "groups")
    assert talk == [list(part) for part in one(CHAT)]
    assert read([TALK], kind="groups").chat and not read([RANKED], kind="groups").chat


def test_scores_rank_and_stay_with_their_answers() -> None:
    rows = [
        {**RANKED, "ranking": None, "scores": [1.0, 3.5, None, 1.0]},
        RANKED,
        {**TALK, "prompt": "the sky is", "responses": [" blue", " a fox"]},
    ]
    batch = batch_of(rows, "groups")
    assert batch.rank.tolist() == [1, 0, 1, 1, 0, 2, 2, 1, 0]
    assert batch.score[:3].tolist() == [1.0, 3.5, 1.0]
    assert batch.score[3:7].isnan().all() and batch.score[7:].tolist() == [0.5, 2.0]
    kept = [answer.tolist() for answer in batch.content.completions[:3]]
    assert kept == [[*ids(RANKED["responses"][i]), EOS] for i in (0, 1, 3)]


def test_a_single_answer_has_a_label() -> None:
    assert answers(SINGLE, "unpaired") == [list(part) for part in one(PLAIN)[:2]]
    talk = {"prompt": CHAT["prompt"], "completion": CHAT["chosen"], "label": "false", "weight": 2}
    assert answers(talk, "unpaired") == [list(part) for part in one(CHAT)[:2]]
    batch = batch_of([SINGLE, {**SINGLE, "label": 0}, {**SINGLE, "weight": 0.5}], "unpaired")
    assert batch.desirable.tolist() == [True, False, True]
    assert batch.group.tolist() == [0, 1, 2] and batch.rank.tolist() == [-1, -1, -1]
    assert batch.weight.tolist() == [1, 1, 0.5]


def test_a_merge_in_one_answer_moves_the_boundary_of_all(caplog) -> None:
    row = {"prompt": "the fore", "responses": ["st", " near", "st near"], "ranking": [0, 1, 2]}
    with caplog.at_level(logging.WARNING, "alignkit"):
        prompt, *rest = answers(row, "groups")
    whole = [*ids("the forest"), EOS]
    assert prompt == whole[: len(prompt)] and len(prompt) < len(ids("the fore"))
    assert prompt + rest[0] == whole and prompt + rest[2] == [*ids("the forest near"), EOS]
    assert prompt + rest[1] == [*ids("the fore near"), EOS]
    assert "in 1 rows the prompt's last token merges" in caplog.text


def test_scores_of_pairs_reach_the_batch_per_answer() -> None:
    rows = [{**PLAIN, "score_chosen": 4, "score_rejected": 1.5}, PLAIN]
    batch = batch_of(rows, "pairs")
    chosen, rejected = batch.pairs()
    assert batch.score[chosen][0] == 4 and batch.score[rejected][0] == 1.5
    assert batch.score[2:].isnan().all()
    with pytest.raises(DataError, match=r"Row 0 .*score_rejected is missing"):
        read([{**PLAIN, "score_chosen": 4}])


def test_single_answers_meet_the_prompts_of_others() -> None:
    rows = [{**SINGLE, "prompt": f"the {word} is"} for word in ("sky", "sky", "fox", "river")]
    examples = read(rows, kind="unpaired")
    assert examples.mismatched([0, 1, 2, 3]) == [2, 2, 3, 0]
    content = examples.collate(range(4), [0] * 4).content
    other = content.recombine([0, 2], [3, 1])
    assert [p.tolist() for p in other.prompts] == [ids("the sky is"), ids("the fox is")]
    assert other.completions[0] is content.completions[3] and other.owner == (0, 1)
    assert other.completions[1] is content.completions[1]


# ---- limits and policies


def test_one_prompt_is_cut_for_all_answers(caplog) -> None:
    texts = ["the sky is", *(f" {t}" for t in ("blue", "grey and blue in the evening"))]
    lengths = [len(ids(text)) for text in texts]
    longest = lengths[2] + 1
    row = {"prompt": texts[0], "responses": texts[1:], "ranking": [0, 1]}
    with caplog.at_level(logging.WARNING, "alignkit"):
        limit = longest + 1
        prompt, short, long = answers(row, "groups", max_length=limit, truncation="keep_end")
        assert prompt == ids(texts[0])[-1:] and len(short) == lengths[1] + 1
        assert len(long) == longest
        prompt, short, long = answers(row, "groups", max_length=lengths[0] + 2)
        assert len(prompt) == lengths[0] and len(long) == 2 and long == ids(texts[2])[:2]
    assert caplog.text.count("1 rows were longer") == 2


def test_rankings_that_teach_nothing_are_counted() -> None:
    same = {**RANKED, "responses": [" blue"] * 4}
    tied = {**RANKED, "ranking": [0, 0, 0, 0]}
    partly = {**RANKED, "responses": [" blue", " blue", " a fox", " a fox"]}
    examples = read([same, RANKED, tied, partly], kind="groups")
    assert [row.number for row in examples.rows] == [1, 3]
    assert examples.skipped == {"all answers are the same": 1, "tie": 1}
    assert len(read([same, RANKED], kind="groups", identical_pairs="keep")) == 2
    with pytest.raises(DataError, match=r"Row 0 .*all answers are the same"):
        read([same], kind="groups", identical_pairs="error")


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("groups", {"responses": " blue"}, "responses is a list of answers"),
        ("groups", {"responses": [" blue", " ", " a", " b"]}, r"responses\[1\] is empty"),
        ("groups", {"responses": [" blue", 3, " a", " b"]}, r"responses\[1\] must be a string"),
        ("groups", {"responses": [" blue"], "ranking": [0]}, "at least two answers"),
        ("groups", {"ranking": [0, 1]}, "one number per answer, 4; got 2"),
        ("groups", {"ranking": None, "scores": None}, "got neither"),
        ("groups", {"weight": "x"}, "weight is a finite number"),
        ("unpaired", {"label": None}, "label is true or false"),
        ("unpaired", {"label": 0.5}, "label is true or false"),
        ("unpaired", {"completion": ""}, "completion is empty"),
        ("unpaired", {"completion": None}, "completion must be a string"),
        ("unpaired", {"prompt": None}, "there is no prompt"),
        ("unpaired", {"prompt": [turn("assistant", "a")]}, "ends with an assistant message"),
    ],
)
def test_a_bad_row_is_named_or_left_out_by_policy(kind, change, words) -> None:
    good = {"groups": RANKED, "unpaired": SINGLE}[kind]
    rows = [good, {**good, **change}, good]
    with pytest.raises(DataError, match=rf"Row 1 .*{words}.*on_bad_row"):
        read(rows, kind=kind)
    examples = read(rows, kind=kind, on_bad_row="skip")
    assert [row.number for row in examples.rows] == [0, 2]
    assert sum(examples.skipped.values()) == 1


def test_rows_of_another_kind_are_named() -> None:
    with pytest.raises(DataError, match=r"rows of pairs have .*They are the columns of unpaired"):
        read([SINGLE])
    with pytest.raises(DataError, match=r"'chosen', 'rejected' is missing.*columns of groups"):
        read([RANKED])
    with pytest.raises(DataError, match=r"'ranking' is missing.*Did you mean 'rankings'"):
        read([{"prompt": "a", "responses": ["a"], "rankings": [0]}], kind="groups")
    with pytest.raises(ConfigError, match=r"kind of rows 'group'.*Did you mean 'groups'"):
        text_wing().examples([RANKED], TextOptions(), kind="group", seed=0)


# ---- where rows come from


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("kind", ["groups", "unpaired"])
def test_the_same_rows_from_files(form: str, kind: str, tmp_path: Path) -> None:
    import datasets

    rows: list[dict[str, Any]] = {
        "groups": [{**TALK, "responses": [CHAT["chosen"], CHAT["rejected"]]}, TALK_LONG],
        "unpaired": [SINGLE, {**SINGLE, "label": False}],
    }[kind]
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    found, expected = batch_of(path, kind), batch_of(rows, kind)
    for ours, theirs in zip(found.content.completions, expected.content.completions, strict=True):
        assert np.array_equal(ours, theirs)
    assert found.rank.tolist() == expected.rank.tolist()
    if kind == "groups":
        assert found.score.tolist() == expected.score.tolist()
    else:
        assert found.desirable.tolist() == [True, False]


TALK_LONG = {
    "prompt": CHAT["prompt"],
    "responses": [CHAT["chosen"], CHAT["rejected"], [turn("assistant", "grey")]],
    "scores": [1.0, 2.0, 0.0],
}


def test_labels_of_a_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*SINGLE, "weight"])
        writer.writeheader()
        writer.writerows({**SINGLE, "label": label} for label in ("true", "False", 1, 0, True))
    batch = batch_of(path, "unpaired")
    assert batch.desirable.tolist() == [True, False, True, False, True] and batch.weight is None
    with pytest.raises(DataError, match=r"line 7.*label is true or false"):
        path.write_text(path.read_text() + "x,y,maybe,\n")
        batch_of(path, "unpaired")
