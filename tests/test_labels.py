"""What rows say of their answers: rankings, scores, labels; and who meets whose prompt."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from alignkit.batches import Batch
from alignkit.columns import BadRow
from alignkit.errors import DataError
from alignkit.labels import Label, Labels, group_label, pair_label, single_label
from alignkit.sources import RowSource
from tests.builders import ONE_PROCESS, Cells


def ranks(count: int, **row: Any) -> tuple[list[int], list[int]]:
    places, label = group_label(row, count)
    return places, list(label.rank)


# ---- rankings


@pytest.mark.parametrize(
    ("scores", "rank"),
    [
        ([0.1, 0.9, 0.5], [2, 0, 1]),
        ([1, 3, 3, 2], [2, 0, 0, 1]),
        ([2, 2], [0, 0]),
        (["1.5", "-2"], [0, 1]),
        (np.array([1.0, 2.0]), [1, 0]),
        (torch.tensor([1.0, 2.0]), [1, 0]),
    ],
)
def test_scores_are_ranked_from_the_highest_and_equal_ones_tie(scores, rank) -> None:
    places, label = group_label({"scores": scores}, len(rank))
    assert places == list(range(len(rank))) and list(label.rank) == rank
    assert label.score == pytest.approx([float(s) for s in scores])
    assert label.tie == (len(set(rank)) == 1)


@pytest.mark.parametrize(
    ("given", "rank"),
    [
        ([2, 0, 1], [2, 0, 1]),
        ([0, 0, 1], [0, 0, 1]),
        ([0, 5, 9], [0, 1, 2]),
        ([0, -1, -1], [0, -1, -1]),
        ([0, None, 1.0], [0, -1, 1]),
        (["1", "0"], [1, 0]),
    ],
)
def test_a_ranking_is_kept_and_made_dense(given, rank) -> None:
    assert ranks(len(rank), ranking=given) == (list(range(len(rank))), rank)


def test_what_has_no_score_is_left_out_and_not_worst() -> None:
    places, label = group_label({"scores": [0.2, None, 0.7, ""]}, 4)
    assert places == [0, 2] and label.rank == (1, 0) and label.score == (0.2, 0.7)
    with pytest.raises(BadRow, match="at least two answers"):
        group_label({"scores": [0.2, None]}, 2)


def test_a_ranking_wins_and_its_scores_are_kept() -> None:
    places, label = group_label({"ranking": [1, 0], "scores": [3.0, None]}, 2)
    assert places == [0, 1] and label.rank == (1, 0)
    assert label.score[0] == 3.0 and math.isnan(label.score[1])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, "ranking or scores; got neither"),
        ({"ranking": [1, 2, 3]}, "best answer of a ranking has rank 0"),
        ({"ranking": [-1, -1, -1]}, "has rank 0"),
        ({"ranking": [0, 1]}, "one number per answer, 3; got 2"),
        ({"ranking": "0 1 2"}, "ranking is a list"),
        ({"ranking": [0, 0.5, 1]}, "whole number"),
        ({"ranking": [0, -2, 1]}, "whole number"),
        ({"scores": [1, 2, "high"]}, "score is a finite number"),
        ({"scores": [1, 2, math.nan]}, "score is a finite number"),
        ({"scores": 3}, "scores is a list"),
        ({"scores": [1, 2, 3], "weight": -1}, "weight is a finite number"),
        ({"scores": [1, 2, 3], "margin": 1.0}, "'margin' speaks of a pair, and rows are rankings"),
    ],
)
def test_rankings_that_are_none(row, words) -> None:
    with pytest.raises(BadRow, match=words):
        group_label(row, 3)


# ---- labels and pairs


def test_what_speaks_of_a_pair_is_refused_on_single_answers() -> None:
    for name in ("margin", "p_chosen"):
        with pytest.raises(BadRow, match=f"'{name}' speaks of a pair, and rows are single answers"):
            single_label({"label": True, name: 0.5})
        assert single_label({"label": True, name: None}).desirable


@pytest.mark.parametrize(
    "value", [True, 1, 1.0, "true", "True", " TRUE ", "1", np.True_, np.int64(1)]
)
def test_ways_to_say_yes(value) -> None:
    assert single_label({"label": value}).desirable is True


@pytest.mark.parametrize("value", [False, 0, 0.0, "false", "False", "0", np.False_])
def test_ways_to_say_no(value) -> None:
    assert single_label({"label": value}).desirable is False


@pytest.mark.parametrize("value", [None, "", "yes", 2, -1, 0.5, math.nan, []])
def test_labels_that_are_none(value) -> None:
    with pytest.raises(BadRow, match="label is true or false"):
        single_label({"label": value})


def test_scores_of_a_pair_come_together() -> None:
    assert pair_label({}).score == ()
    assert pair_label({"score_chosen": "2", "score_rejected": 0.5}).score == (2.0, 0.5)
    with pytest.raises(BadRow, match="score_rejected is missing"):
        pair_label({"score_chosen": 1.0, "score_rejected": ""})
    with pytest.raises(BadRow, match="score_chosen is a finite number"):
        pair_label({"score_chosen": math.inf, "score_rejected": 1.0})


# ---- the batch


def test_a_batch_of_uneven_groups() -> None:
    labels = [
        Label((0, 1, 2), (3.0, 2.0, 1.0)),
        Label((1, 0), numbers={"weight": 2.0}),
        Label((0, 0, 1, -1), (1.0, 1.0, 0.0, 0.5)),
    ]
    batch = Labels([4, 7, 9], labels).batch(Cells(tuple(range(6))), [2, 1])
    assert batch.group.tolist() == [0, 0, 0, 0, 1, 1]
    assert batch.rank.tolist() == [0, 0, 1, -1, 1, 0]
    assert batch.row_id.tolist() == [9, 7] and batch.weight.tolist() == [1, 2]
    assert batch.score[:4].tolist() == [1, 1, 0, 0.5] and batch.score[4:].isnan().all()
    assert batch.desirable is None and batch.target_margin is None
    part = batch.select([1])
    assert (
        part.rank.tolist() == [1, 0] and part.score.isnan().all() and part.group.tolist() == [0, 0]
    )


def test_single_answers_have_a_label_and_no_rank() -> None:
    labels = [Label((-1,), desirable=value) for value in (True, False, True)]
    batch = Labels([0, 1, 2], labels).batch(Cells((0, 1)), [1, 2])
    assert batch.desirable.dtype == torch.bool and batch.desirable.tolist() == [False, True]
    assert batch.rank.tolist() == [-1, -1] and batch.score is None
    assert batch.absent().desirable.tolist() == [False, True]


# ---- mismatched answers


def singles(weights: list[float]) -> Labels:
    labels = [Label((-1,), desirable=True, numbers={"weight": w}) for w in weights]
    return Labels(range(len(labels)), labels)


def test_the_next_row_with_another_prompt_and_a_weight() -> None:
    labels = singles([1, 1, 0, 1, 1])
    assert labels.mismatched(range(5), "abcde") == [1, 3, 3, 4, 0]
    assert labels.mismatched(range(5), "aabba") == [3, 3, 4, 4, 3]
    assert labels.mismatched([3, 0, 1], "dab") == [1, 2, 0]
    assert labels.mismatched(range(5), "aaaaa") == [0, 1, 2, 3, 4]
    assert labels.mismatched([0], "a") == [0]


class Paired(Cells):
    """Answers of prompts: cells are 10 * prompt + answer."""

    def select(self, groups: Any, answers: Any) -> Paired:
        return Paired(tuple(self.cells[a] for a in answers))

    def recombine(self, groups: Any, answers: Any) -> Paired:
        return Paired(
            tuple(
                self.cells[g] // 10 * 10 + self.cells[a] % 10
                for g, a in zip(groups, answers, strict=True)
            )
        )


class Singles:
    """Rows with prompt 0, 0, 1, 1, 2, 2 ... and answer equal to the row's number."""

    skipped: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, weights: list[float]) -> None:
        self.labels = singles(weights)

    def __len__(self) -> int:
        return len(self.labels.rows)

    def collate(self, indices: Any, epochs: Any) -> Batch:
        return self.labels.batch(Paired(tuple(i // 2 * 10 + i for i in indices)), indices)

    def mismatched(self, indices: Any) -> list[int]:
        return self.labels.mismatched(indices, [i // 2 for i in indices])


def pairs_of(rank: int, size: int, weights: list[float], batch_size: int = 6) -> list[list[Any]]:
    """Per global batch, (position, row, prompt, answer of the mismatch)."""
    processes = SimpleNamespace(**{**vars(ONE_PROCESS), "rank": rank, "size": size})
    source = RowSource(
        Singles(weights),
        batch_size=batch_size,
        epochs=1,
        seed=0,
        processes=processes,
        mismatched=True,
    )
    found = []
    for batch in source:
        other = batch.mismatched
        assert torch.equal(other.position, batch.position)
        assert torch.equal(other.row_id, batch.row_id) and torch.equal(other.weight, batch.weight)
        cells = [(cell // 10, cell % 10) for cell in other.content.cells]
        found.append(
            [
                (position, row, *cell)
                for position, row, cell, weight in zip(
                    batch.position.tolist(), batch.row_id.tolist(), cells, batch.weight, strict=True
                )
                if weight > 0
            ]
        )
    return found


def test_mismatches_are_those_of_the_global_batch_whoever_makes_them() -> None:
    weights = [1.0] * 10
    alone = pairs_of(0, 1, weights)
    assert [len(batch) for batch in alone] == [6, 4]
    for batch in alone:
        order = [row for _, row, _, _ in batch]
        for place, row, prompt, answer in batch:
            assert prompt == row // 2 and answer // 2 != prompt
            between = order[place + 1 :] + order[:place]
            assert answer == next(other for other in between if other // 2 != prompt)
    for size in (2, 3):
        shares = [pairs_of(rank, size, weights) for rank in range(size)]
        for number, batch in enumerate(alone):
            assert [row for share in shares for row in share[number]] == batch


def test_micro_batches_keep_their_mismatches_and_padding_has_none() -> None:
    batch = next(
        iter(
            RowSource(
                Singles([1.0] * 6),
                batch_size=6,
                epochs=1,
                seed=0,
                processes=ONE_PROCESS,
                mismatched=True,
            )
        )
    )
    part = batch.select([4, 1])
    assert part.mismatched.content.cells == tuple(batch.mismatched.content.cells[i] for i in (4, 1))
    assert part.absent().mismatched.weight.tolist() == [0, 0]
    assert part.mismatched.mismatched is None


def test_pairs_cannot_be_put_to_other_prompts() -> None:
    class Pairs(Singles):
        def __init__(self) -> None:
            self.labels = Labels([0, 1], [Label((0, 1)), Label((0, 1))])

        def collate(self, indices: Any, epochs: Any) -> Batch:
            return self.labels.batch(Paired(tuple(range(2 * len(indices)))), indices)

    source = RowSource(
        Pairs(), batch_size=2, epochs=1, seed=0, processes=ONE_PROCESS, mismatched=True
    )
    with pytest.raises(DataError, match="single answers"):
        next(iter(source))
