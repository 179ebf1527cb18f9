"""The row source: order, epochs, shares of processes, and where it goes on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from alignkit.errors import CheckpointError, DataError
from tests.builders import ONE_PROCESS, TableExamples, table_source


def rows_of(source) -> list[list[int]]:
    return [batch.row_id.tolist() for batch in source]


def test_batches_run_on_across_epochs_and_no_row_is_lost() -> None:
    batches = rows_of(table_source(10, 4, epochs=3))
    assert [len(batch) for batch in batches] == [4] * 7 + [2]
    rows = [row for batch in batches for row in batch]
    for epoch in range(3):
        assert sorted(rows[10 * epoch : 10 * epoch + 10]) == list(range(10))


def test_the_epoch_of_a_row_keys_its_augmentation() -> None:
    source = table_source(5, 3, epochs=2)
    list(source)
    assert [epoch for _, epoch in source.examples.asked] == [0] * 5 + [1] * 5


@pytest.mark.parametrize(("epochs", "rows"), [(0.5, 5), (1.5, 15), (0.01, 1), (2, 20)])
def test_parts_of_an_epoch(epochs, rows) -> None:
    source = table_source(10, 4, epochs=epochs)
    assert source.total_steps == -(-rows // 4)
    assert sum(map(len, rows_of(source))) == rows


def test_the_shuffle_is_replayable_and_differs_by_epoch_and_seed() -> None:
    first = rows_of(table_source(32, 32, epochs=2))
    assert first == rows_of(table_source(32, 32, epochs=2))
    assert first[0] != first[1] and first[0] != list(range(32))
    assert rows_of(table_source(32, 32, epochs=2, seed=1))[0] != first[0]


def test_without_shuffle_the_order_is_that_of_the_data() -> None:
    assert rows_of(table_source(5, 2, shuffle=False)) == [[0, 1], [2, 3], [4]]


def test_an_endless_source_goes_on() -> None:
    source = table_source(3, 2, epochs=None)
    assert source.total_steps is None
    batches = iter(source)
    assert len([next(batches) for _ in range(50)]) == 50


def test_it_goes_on_where_its_state_was_taken() -> None:
    expected = rows_of(table_source(10, 4, epochs=3))
    source = table_source(10, 4, epochs=3)
    batches = iter(source)
    found = [next(batches).row_id.tolist() for _ in range(3)]
    again = table_source(10, 4, epochs=3)
    again.load_state_dict(source.state_dict())
    assert found + rows_of(again) == expected


def test_a_state_of_other_data_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"10 usable rows, the data now has 9"):
        table_source(9, 4).load_state_dict(table_source(10, 4).state_dict())


def test_no_rows_is_refused_with_what_was_skipped() -> None:
    examples = TableExamples(0)
    examples.skipped = {"chosen is empty": 4}
    with pytest.raises(DataError, match=r"chosen is empty.*4"):
        table_source(0, 4, examples=examples)


def process(rank: int, size: int) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(ONE_PROCESS), "rank": rank, "size": size})


@pytest.mark.parametrize("size", [2, 3, 5])
def test_processes_share_each_batch_by_position(size) -> None:
    whole = list(table_source(10, 4))
    shares = [list(table_source(10, 4, processes=process(r, size))) for r in range(size)]
    for step, batch in enumerate(whole):
        expected = list(zip(batch.position.tolist(), batch.row_id.tolist(), strict=True))
        found = [
            (position, row)
            for share in shares
            for position, row, weight in zip(
                share[step].position.tolist(),
                share[step].row_id.tolist(),
                share[step].weights().tolist(),
                strict=True,
            )
            if weight > 0
        ]
        assert found == expected


def test_evaluation_sees_everything_again_and_again_and_moves_nothing() -> None:
    source = table_source(5, 2, shuffle=False)
    for _ in range(2):
        assert [b.row_id.tolist() for b in source.once()] == [[0, 1], [2, 3], [4]]
    assert source.consumed == 0
