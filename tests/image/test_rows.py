"""Files, folders, hub names, datasets and lists as sequences of rows."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alignkit.errors import DataError
from alignkit.rows import read_rows

ROWS = [{"a": "x, y", "b": 1}, {"a": 'qu"ote\nline', "b": 2}, {"a": "ü", "b": 3}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows{suffix}", ROWS)
    expected = [{**row, "b": str(row["b"])} for row in ROWS] if suffix == ".csv" else ROWS
    for data in (path, str(path)):
        rows = read_rows(data)
        assert list(rows) == expected
        assert len(rows) == 3 and rows[-1] == expected[2] and rows[1:] == expected[1:]
        assert rows.folder == tmp_path and rows.name == str(path)
    with pytest.raises(IndexError):
        _ = rows[3]


def test_places_in_messages(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert read_rows(path).where(1) == f"Row 1 (counted from 0) of {path}, line 3"
    assert read_rows([{"a": 1}]).where(0) == "Row 0 (counted from 0) of the given list"


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metadata\.jsonl.*holds nothing"):
        read_rows(tmp_path)
    write(tmp_path / "other.json", ROWS[:1])
    assert list(read_rows(tmp_path)) == ROWS[:1]
    write(tmp_path / "another.csv", ROWS[:1])
    with pytest.raises(DataError, match=r"holds another\.csv, other\.json"):
        read_rows(tmp_path)
    write(tmp_path / "train.jsonl", ROWS[:2])
    assert len(read_rows(tmp_path)) == 2
    write(tmp_path / "metadata.csv", ROWS)
    assert len(read_rows(tmp_path)) == 3
    write(tmp_path / "metadata.jsonl", ROWS + ROWS)
    assert len(read_rows(str(tmp_path))) == 6


def test_datasets(tmp_path: Path) -> None:
    import datasets

    dataset = datasets.Dataset.from_list(ROWS)
    both = datasets.DatasetDict(train=dataset, test=dataset.select([2]))
    assert list(read_rows(dataset)) == ROWS
    assert list(read_rows(dataset.with_format("torch"))) == ROWS
    assert list(read_rows(dataset.to_iterable_dataset())) == ROWS
    assert list(read_rows(both)) == ROWS
    assert list(read_rows(both, split="test")) == ROWS[2:]
    with pytest.raises(DataError, match=r"train, test.*none is 'dev'"):
        read_rows(both, split="dev")
    dataset.save_to_disk(tmp_path / "one")
    both.save_to_disk(tmp_path / "both")
    assert list(read_rows(tmp_path / "one")) == ROWS
    assert list(read_rows(tmp_path / "both", split="test")) == ROWS[2:]


def test_columns_are_renamed_also_crosswise() -> None:
    rows = read_rows([{"a": 1, "b": 2, "c": 3}], columns={"a": "b", "b": "a"})
    assert rows[0] == {"a": 2, "b": 1, "c": 3}
    assert read_rows([{"a": 1, "b": 2}], columns={"x": "a"})[0] == {"x": 1, "b": 2}
    with pytest.raises(DataError, match=r"maps 'x' to 'aa'.*Did you mean 'a'.*found: a, b"):
        read_rows([{"a": 1, "b": 2}], columns={"x": "aa"})


def test_the_given_rows_are_not_changed() -> None:
    given = [{"a": 1}]
    read_rows(given, columns={"x": "a"})[0]["x"] = 2
    assert given == [{"a": 1}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", '{"a": 1}\n{"a": \n', r"line 2: not valid JSON"),
        ("rows.jsonl", '{"a": 1}\n[1]\n', r"line 2: .*one JSON object; got list"),
        ("rows.jsonl", "", "at least one row"),
        ("rows.json", '[{"a": 1},\n{"a": }]', r"line 2: not valid JSON"),
        ("rows.json", '{"a": 1}\n{"a": 2}', r"\.jsonl format"),
        ("rows.json", '{"a": [1]}', "one list of objects"),
        ("rows.json", "[]", "at least one row"),
        ("rows.json", "[1]", "a dict of columns; got int"),
        ("rows.csv", "a,b\n1,2\n3\n", r"line 3: .*as many fields as the header \(2\)"),
        ("rows.csv", "a,b\n1,2,3\n", r"line 2"),
        ("rows.csv", "a,b\n", "at least one row"),
        ("rows.parquet", "no", "must be a parquet file"),
        ("rows.txt", "x", r"end in \.jsonl"),
    ],
)
def test_broken_files_name_the_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match="UTF-8"):
        read_rows(tmp_path / "rows.jsonl")
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbfa\n1\n")
    assert list(read_rows(tmp_path / "rows.csv")) == [{"a": "1"}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("gone.jsonl", "no file or folder 'gone.jsonl'"),
        ("./gone", "no file or folder"),
        ("one/two/three", "no file or folder"),
        ({"a": [1]}, "not one dict"),
        (7, "got int"),
        ([], "the given list is empty"),
    ],
)
def test_what_is_no_data(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(data)


def test_hub_names_go_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, split: str, *, streaming: bool) -> Any:
        assert not streaming
        asked.append((name, split))
        if name == "owner/gone":
            raise FileNotFoundError("not there")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read_rows("owner/name", split="validation")
    assert list(rows) == ROWS and rows.name == "owner/name" and rows.folder is None
    assert asked == [("owner/name", "validation")]
    with pytest.raises(DataError, match=r"'owner/gone'.*not there"):
        read_rows("owner/gone")


def test_reading_text_formats_loads_nothing_heavy(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    code = (
        "import sys; from alignkit.rows import read_rows\n"
        f"assert len(read_rows({str(path)!r})) == 3\n"
        "assert not {'torch', 'datasets', 'pyarrow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
