"""Streams: units of every format, the shuffle, and resuming without losing or repeating a row."""

from __future__ import annotations

import csv
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from alignkit import DPO, Mixture, TextOptions, TrainerOptions, align, build
from alignkit.errors import CheckpointError, ConfigError, DataError
from alignkit.rows import read_rows
from alignkit.stream import is_streamed, open_stream
from alignkit.stream_source import CHUNK, StreamSource
from alignkit.text.data import Reader
from alignkit.text.streamed import TextStream
from tests.builders import ONE_PROCESS, pair_rows, tiny_lm, tiny_tokenizer

SIZES = (1, 255, 256, 257, 700)


def ids_rows(num: int, base: int = 0) -> list[dict[str, Any]]:
    """Rows that cost nothing to read; the prompt names the row."""
    return [
        {"prompt_ids": [base + i], "chosen_ids": [5, 6], "rejected_ids": [7]} for i in range(num)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
    return path


# ---- units


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("num", SIZES)
def test_any_unit_of_any_file_can_be_read_from_any_row(suffix, num, tmp_path) -> None:
    rows = [{"a": str(i), "b": 'é, "x"\n\u2028' * (i % 3)} for i in range(num)]
    path = write(tmp_path / f"rows{suffix}", rows)
    stream = open_stream(path)
    assert stream.num_rows == num and list(stream) == rows == list(read_rows(path))
    for unit in range(stream.num_units):
        whole = list(stream.read(unit))
        assert [rows[number] for number, _ in whole] == [row for _, row in whole]
        for skip in (1, 50):
            assert list(stream.read(unit, skip)) == whole[skip:]
        assert [stream.offset(unit, number) for number, _ in whole] == list(range(len(whole)))


def test_a_file_without_a_last_newline_and_with_blank_lines(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    stream = open_stream(path, columns={"b": "a"})
    assert list(stream.read(0)) == [(0, {"b": 1}), (2, {"b": 2})]
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(DataError, match=r"line 2: not valid JSON"):
        list(open_stream(path))


def test_shards_are_one_set_and_numbered_on(tmp_path) -> None:
    for name, part in (("train-0001", 30), ("train-0000", 300), ("test-0000", 5)):
        write(tmp_path / f"{name}.jsonl", ids_rows(part))
    stream = open_stream(tmp_path)
    assert stream.num_rows == len(read_rows(tmp_path)) == 330
    numbers = [number for unit in range(stream.num_units) for number, _ in stream.read(unit)]
    assert numbers == list(range(330))


def test_what_is_streamed_by_itself(tmp_path, monkeypatch) -> None:
    import datasets

    path = write(tmp_path / "a.jsonl", ids_rows(9))
    endless = datasets.Dataset.from_list(ids_rows(9)).to_iterable_dataset()
    assert not is_streamed(path, "auto") and is_streamed(path, True)
    assert is_streamed(endless, "auto") and not is_streamed(endless, False)
    assert not is_streamed(ids_rows(9), "auto")
    monkeypatch.setattr("alignkit.stream.STREAM_FROM", 100)
    assert is_streamed(path, "auto") and is_streamed(tmp_path, "auto")
    assert list(open_stream(endless)) == ids_rows(9)
    with pytest.raises(DataError, match="one value, read as a whole"):
        (tmp_path / "a.json").write_text("[]")
        open_stream(tmp_path / "a.json")


# ---- the source


def stream_of(data: Any, options: TextOptions, kind: str) -> TextStream:
    stream = open_stream(data)
    reader = partial(Reader, stream, tiny_tokenizer(), options, kind)
    return TextStream(stream, reader, lambda examples: None)


def source(data: Any, *, buffer: int = 300, batch: int = 7, **more: Any) -> StreamSource:
    options = TextOptions(on_bad_row="skip", identical_pairs="skip")
    sets = data if isinstance(data, dict) else {"": data}
    kind = more.pop("kind", "pairs")
    streams = {name: stream_of(one, options, kind) for name, one in sets.items()}
    given = {"seed": 0, "processes": ONE_PROCESS, **more}
    return StreamSource(streams, batch_size=batch, buffer=buffer, **given)


def rows_of(batches: Any, num: int) -> list[list[int]]:
    return [batch.row_id.tolist() for batch in itertools.islice(batches, num)]


def forms(tmp_path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    import datasets

    half = len(rows) // 2
    for part, some in enumerate((rows[:half], rows[half:])):
        write(tmp_path / f"train-{part}.jsonl", some)
    return {
        "file": write(tmp_path / "a.jsonl", rows),
        "parquet": write(tmp_path / "a.parquet", rows),
        "list": rows,
        "dataset": datasets.Dataset.from_list(rows),
        "endless": datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=3),
    }


NUM = 760


SLOWER = [pytest.param(form, marks=pytest.mark.slow) for form in ("parquet", "list", "dataset")]


@pytest.mark.parametrize("form", ["file", "endless", *SLOWER])
def test_every_row_comes_once_an_epoch_and_resuming_loses_none(form, tmp_path) -> None:
    rows = ids_rows(NUM)
    rows[3] = {**rows[3], "rejected_ids": []}  # a bad row
    data = forms(tmp_path, rows)[form]
    steps, usable = 2 * (NUM - 1) // 7, [i for i in range(NUM) if i != 3]
    expected = rows_of(source(data), steps)
    flat = list(itertools.chain.from_iterable(expected))
    first, second = flat[: NUM - 1], flat[NUM - 1 :]
    assert sorted(first) == usable != first
    assert len(set(second)) == len(second) > NUM - 8 and second != first[: len(second)]
    for stop in (0, 1, 40, 108, 109, steps - 3):
        before, after = source(data), source(data)
        done = rows_of(before, stop)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert done + rows_of(after, steps - stop) == expected, stop
        assert sum(after.facts()["skipped"].values()) == 2, stop


def test_the_shuffle_mixes_a_file_and_is_keyed(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", ids_rows(5000))
    first = rows_of(source(path, buffer=1024, batch=1024), 1)[0]
    # The buffer holds units from all over the file, not its beginning.
    assert max(first) - min(first) > 2500 and len({row // 256 for row in first}) >= 4
    assert rows_of(source(path, buffer=1024, batch=1024, seed=1), 1)[0] != first
    kept = source(path, shuffle=False)
    assert rows_of(kept, 3) == [list(range(i, i + 7)) for i in (0, 7, 14)]


def test_a_preview_is_what_comes_and_moves_nothing() -> None:
    stream = source(ids_rows(100))
    rows_of(stream, 2)
    seen = rows_of(stream.preview(30), 30)
    assert rows_of(stream, 30) == seen and stream.consumed == 32 * 7


def test_single_answers_meet_other_prompts() -> None:
    rows = [{"prompt": f"the sky {i % 3}", "completion": " blue", "label": True} for i in range(20)]
    batch = next(iter(source(rows, kind="unpaired", mismatched=True)))
    assert batch.mismatched is not None and batch.mismatched.num_groups == 7


def test_changed_data_is_noticed(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", ids_rows(600))
    first = source(path)
    rows_of(first, 4)
    state = first.state_dict()
    write(path, ids_rows(600, base=1))
    changed = source(path)
    changed.load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"other rows than .*a\.jsonl has now"):
        next(iter(changed))
    write(path, ids_rows(599))
    with pytest.raises(CheckpointError, match=r"made on 600 rows, and .* now has 599"):
        source(path).load_state_dict(state)
    with pytest.raises(CheckpointError, match="not streamed"):
        source(path).load_state_dict({"consumed": 4, "num_rows": 600})


def test_no_usable_row_is_an_error() -> None:
    rows = [{"prompt_ids": [1], "chosen_ids": [5], "rejected_ids": []}] * 3
    with pytest.raises(DataError, match=r"no usable row.*rejected_ids"):
        next(iter(source(rows)))


def test_a_bad_row_is_named_by_its_line(tmp_path) -> None:
    rows = ids_rows(400)
    rows[333] = {**rows[333], "chosen_ids": []}
    path = write(tmp_path / "a.jsonl", rows)
    stream = stream_of(path, TextOptions(), "pairs")
    bad = StreamSource({"": stream}, batch_size=400, buffer=400, seed=0, processes=ONE_PROCESS)
    with pytest.raises(DataError, match=r"Row 333 \(counted from 0\) of .*a\.jsonl"):
        next(iter(bad))


def test_mixed_streams_keep_their_shares_and_resume() -> None:
    data = {"a": ids_rows(300), "b": ids_rows(40, base=50)}
    weights = {"a": 1.0, "b": 3.0}
    steps = 100
    mixed = source(data, weights=weights, batch=8)
    expected = rows_of(mixed, steps)
    drawn = mixed.facts()["drawn"]
    # Binomial: 800 rows at 3/4, within 4 standard deviations.
    assert sum(drawn.values()) == 800 and abs(drawn["b"] - 600) < 4 * (800 * 0.75 * 0.25) ** 0.5
    first = source(data, weights=weights, batch=8)
    done = rows_of(first, 37)
    second = source(data, weights=weights, batch=8)
    second.load_state_dict(first.state_dict())
    assert done + rows_of(second, steps - 37) == expected
    assert second.facts()["drawn"] == drawn


def test_chunks_are_smaller_than_the_buffer_here() -> None:
    """What the tests above rest on: buffers, chunks and batches do not fit into each other."""
    assert CHUNK < 300 < NUM and 300 % CHUNK and CHUNK % 7


# ---- runs


def trained(data: Any, tmp_path: Path, *, max_steps: int = 4, **more: Any) -> Any:
    return align(
        (tiny_lm(), tiny_tokenizer()),
        DPO(),
        data,
        trainer=TrainerOptions(max_steps=max_steps, batch_size=3, save_every=2),
        run_dir=tmp_path / "run",
        **more,
    )


@pytest.mark.slow
def test_a_run_on_a_stream_resumes_to_the_same_numbers(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", pair_rows(20))
    options = TextOptions(streaming=True, shuffle_buffer=8)
    whole = trained(path, tmp_path / "a", data_options=options)
    run = build(
        (tiny_lm(), tiny_tokenizer()),
        DPO(),
        path,
        trainer=TrainerOptions(max_steps=4, batch_size=3, save_every=2),
        run_dir=tmp_path / "b" / "run",
        data_options=options,
    )
    for record in run.steps():
        if record.step == 3:
            break
    run.abandon()
    again = trained(path, tmp_path / "b", data_options=options)
    assert [line["loss"] for line in again.history] == [line["loss"] for line in whole.history]
    assert "streamed, 12 so far" in (tmp_path / "b/run/report.html").read_text()


def test_streams_want_max_steps_and_lose_nothing_by_saying_so(tmp_path) -> None:
    import datasets

    endless = datasets.Dataset.from_list(pair_rows(8)).to_iterable_dataset()
    for trainer in (TrainerOptions(), TrainerOptions(epochs=1)):
        with pytest.raises(ConfigError, match=r"max_steps says when to stop.*streaming=False"):
            build((tiny_lm(), tiny_tokenizer()), DPO(), endless, trainer=trainer)
    read = TextOptions(streaming=False)
    run = build((tiny_lm(), tiny_tokenizer()), DPO(), endless, data_options=read)
    assert run.trainer.total_steps == 1


def test_what_a_loss_needs_is_asked_of_streamed_rows() -> None:
    options = TextOptions(streaming=True)
    trainer = TrainerOptions(max_steps=1, batch_size=2)
    run = build(
        (tiny_lm(), tiny_tokenizer()),
        DPO("odpo"),
        pair_rows(8),
        data_options=options,
        trainer=trainer,
    )
    with pytest.raises(DataError, match="needs the column 'score_chosen'"):
        list(run.steps())


@pytest.mark.slow
def test_a_mixture_of_streams_trains(tmp_path) -> None:
    parts = Mixture(
        {str(write(tmp_path / f"{n}.jsonl", pair_rows(6))): w for n, w in (("a", 1), ("b", 2))}
    )
    result = trained(parts, tmp_path, data_options={"streaming": True})
    assert len(result.history) == 4
    assert "drawn" in (tmp_path / "run/report.html").read_text()
