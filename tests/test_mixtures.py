"""Mixtures: shares, order, resume, and what they are called in files."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest

from alignkit import DPO, CheckpointError, ConfigError, DataError, Mixture, TextOptions, align
from alignkit.config import from_mapping, to_mapping
from alignkit.mixtures import quotas
from alignkit.options import TrainerOptions
from alignkit.orders import Mixed, Part
from tests.builders import (
    TableExamples,
    pair_rows,
    table_source,
    text_wing,
    tiny_lm,
    tiny_tokenizer,
)


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ([100, 100], [0.7, 0.3], [140, 60]),
        ([10, 1], [1, 1], [6, 5]),
        ([3, 3, 1], [1, 1, 1], [3, 2, 2]),
        ([5], [9], [5]),
    ],
)
def test_an_epoch_is_shared_in_proportion(sizes, weights, expected) -> None:
    assert quotas(sizes, weights) == expected


PARTS = [Part("a", 70, 1.0), Part("b", 10, 3.0)]


def test_each_set_is_gone_through_before_it_repeats() -> None:
    order = Mixed(PARTS, 0, shuffle=True)
    places = [order.row(place) for place in range(400)]
    sets = {"a": [p for p in places if p[1] < 70], "b": [p for p in places if p[1] >= 70]}
    assert {name: len(rows) for name, rows in sets.items()} == {"a": 100, "b": 300}
    for rows, size in ((sets["a"], 70), (sets["b"], 10)):
        for start in range(0, len(rows) - size + 1, size):
            epoch = rows[start : start + size]
            assert {e for e, _ in epoch} == {start // size} and len({r for _, r in epoch}) == size
    assert [row for _, row in sets["b"][:10]] != [row for _, row in sets["b"][10:20]]
    for place in (0, 1, 79, 80, 333):
        found = Counter("ab"[row >= 70] for _, row in places[:place])
        assert order.drawn(place) == {"a": found["a"], "b": found["b"]}


def test_the_order_is_a_function_of_the_place_and_the_seed() -> None:
    forward = [Mixed(PARTS, 0, shuffle=True).row(place) for place in range(0, 300, 37)]
    order = Mixed(PARTS, 0, shuffle=True)
    assert [order.row(place) for place in reversed(range(0, 300, 37))][::-1] == forward
    assert [Mixed(PARTS, 1, shuffle=True).row(place) for place in range(0, 300, 37)] != forward
    kept = Mixed(PARTS, 0, shuffle=False)
    rows = [kept.row(place)[1] for place in range(80)]
    assert [r for r in rows if r < 70] == list(range(20))


def examples() -> Any:
    found = TableExamples(80)
    found.parts = PARTS
    return found


def test_a_source_of_a_mixture_resumes_by_one_number() -> None:
    expected = [b.row_id.tolist() for b in table_source(80, 7, epochs=3, examples=examples())]
    source = table_source(80, 7, epochs=3, examples=examples())
    done = [b.row_id.tolist() for b in itertools.islice(source, 9)]
    again = table_source(80, 7, epochs=3, examples=examples())
    again.load_state_dict(source.state_dict())
    assert done + [b.row_id.tolist() for b in again] == expected
    assert again.facts()["drawn"] == {"a": 60, "b": 180}


def test_changed_rows_of_equal_number_are_refused() -> None:
    wing = text_wing()

    def source(rows: list[dict[str, Any]]) -> Any:
        found = wing.examples(rows, TextOptions(), kind="pairs", seed=0)
        return table_source(len(rows), 4, examples=found)

    rows = pair_rows(6)
    state = source(rows).state_dict()
    source(pair_rows(6)).load_state_dict(state)
    for change in ({"chosen": [{"role": "assistant", "content": "no"}]}, {"weight": 2.0}):
        other = [*rows[:5], {**rows[5], **change}]
        with pytest.raises(CheckpointError, match="there are 6 as then, and their contents"):
            source(other).load_state_dict(state)


def test_sets_keep_their_own_layouts_and_are_numbered_on() -> None:
    steer = {"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": 1}
    mixture = Mixture([(pair_rows(4), 1), ([steer] * 3, 2)])
    found = text_wing().examples(mixture, TextOptions(), kind="pairs", seed=0)
    assert found.parts == [Part("rows (0)", 4, 1), Part("rows (1)", 3, 2)]
    assert list(found.labels.rows) == list(range(7))
    empty = Mixture([(pair_rows(4), 1), ([steer | {"preference_strength": 0}], 2)])
    with pytest.raises(DataError, match=r"rows \(1\) has none. Left out: {'tie': 1}"):
        text_wing().examples(empty, TextOptions(), kind="pairs", seed=0)


@pytest.mark.slow
def test_a_mixture_trains_and_its_counts_are_reported(tmp_path) -> None:
    mixture = Mixture([(pair_rows(9), 3), (pair_rows(3), 1)])
    result = align(
        (tiny_lm(), tiny_tokenizer()),
        DPO(),
        mixture,
        trainer=TrainerOptions(batch_size=4),
        run_dir=tmp_path / "run",
    )
    assert len(result.history) == 3
    assert "rows (0): 9; rows (1): 3" in (tmp_path / "run/report.html").read_text()


def test_in_a_file_a_mixture_is_a_mapping() -> None:
    given = {
        "policy": "p",
        "method": "dpo",
        "data": {"mixture": {"a.jsonl": 0.7, "b.jsonl": "3e-1"}},
    }
    config = from_mapping(given)
    assert config.data == Mixture({"a.jsonl": 0.7, "b.jsonl": 0.3})
    written = to_mapping(config)["data"]
    assert written == {"mixture": {"a.jsonl": 0.7, "b.jsonl": 0.3}}
    assert from_mapping({**given, "data": written}).data == config.data
    for bad, words in (
        ({"mix": {}}, "Did you mean 'mixture'"),
        ({"mixture": {}}, "at least one data set"),
        ({"mixture": {"a": 0}}, "a number above 0; got 0"),
        ({"mixture": {"a": "much"}}, "data.mixture.a must be a number"),
    ):
        with pytest.raises(ConfigError, match=words):
            from_mapping({**given, "data": bad})
