"""Rows in many files: parquet shards, tar files, and what an archive may not do."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from alignkit.errors import DataError
from alignkit.rows import read_rows
from alignkit.splits import in_part, is_held_out


def write_parquet(path: Path, numbers: range, column: str = "prompt") -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(
        {column: [f"p{n}" for n in numbers], "image": [bytes([n]) for n in numbers]}
    )
    pyarrow.parquet.write_table(table, path, row_group_size=3)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, raw in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))


def test_parquet_shards_are_one_data_set(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", range(0, 7))
    write_parquet(tmp_path / "train-00001-of-00002.parquet", range(7, 12))
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", range(12, 14))
    rows = read_rows(tmp_path)
    assert len(rows) == 12
    assert [row["prompt"] for row in rows] == [f"p{n}" for n in range(12)]
    assert rows[11]["image"] == bytes([11]) and rows[3]["prompt"] == "p3"
    assert len(read_rows(tmp_path, split="validation")) == 2
    with pytest.raises(DataError, match="shards of one format"):
        read_rows(tmp_path, split="test")


def test_shards_with_other_columns_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", range(3))
    write_parquet(tmp_path / "b.parquet", range(3), column="caption")
    with pytest.raises(DataError, match=r"b\.parquet has caption.*a\.parquet has prompt"):
        read_rows(tmp_path)


def test_tar_rows_by_key(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        {
            "x/000.0.jpg": b"zero",
            "x/000.1.jpg": b"one",
            "x/000.json": json.dumps(
                {"caption": "a cat", "label_0": 1, "jpg_0": "/etc/hosts"}
            ).encode(),
            "x/001.chosen.png": b"good",
            "x/001.rejected.png": b"bad",
            "x/001.txt": b"a dog\n",
        },
    )
    write_tar(tmp_path / "b.tar", {"k.jpg": b"one", "k.json": b'{"prompt": "", "label": true}'})
    rows = read_rows(tmp_path)
    assert len(rows) == 3 and rows.sealed
    assert rows[0] == {"caption": "a cat", "label_0": 1, "jpg_0": b"zero", "jpg_1": b"one"}
    assert rows[1] == {"chosen": b"good", "rejected": b"bad", "prompt": "a dog"}
    assert rows[2] == {"prompt": "", "label": True, "image": b"one"}


def test_archives_cannot_lead_out_or_run_code(tmp_path: Path) -> None:
    path = tmp_path / "bad.tar"
    write_tar(path, {"a.pkl": b"cos\nsystem\n"})
    with pytest.raises(DataError, match="pickled"):
        read_rows(path)
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hosts"
        archive.addfile(link)
    with pytest.raises(DataError, match=r"a\.jpg.*link"):
        read_rows(path)
    path.write_bytes(b"no archive")
    with pytest.raises(DataError, match="tar file"):
        read_rows(path)
    write_tar(path, {"a.json": b"[1]"})
    with pytest.raises(DataError, match="one object"):
        read_rows(path)


def test_a_split_holds_out_its_share_of_prompts_and_grows_with_it() -> None:
    prompts = [f"prompt {n}" for n in range(4000)]
    few, many = ({p for p in prompts if is_held_out(p, share)} for share in (0.1, 0.3))
    assert few < many
    assert abs(len(few) / 4000 - 0.1) < 0.02 and abs(len(many) / 4000 - 0.3) < 0.03
    assert is_held_out("A  \u00c9t\u00e9 ", 0.5) == is_held_out("a e\u0301te\u0301", 0.5)
    for share in (0.0, 0.5, 1.0):
        for prompt in prompts[:50]:
            parts = [in_part(prompt, share, part) for part in ("train", "held_out")]
            assert sum(parts) == 1 and in_part(prompt, share, "all")
