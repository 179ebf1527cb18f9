"""Lists of prompts in the formats that people keep them in."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignkit.errors import DataError
from alignkit.evaluation.prompt_files import read_prompts

FILES = {
    "plain.txt": "a red circle\n\n  a big cat \n",
    "parti.tsv": "Prompt\tCategory\tNote\na red circle\tShapes\t\na big cat\tAnimals\tx\n",
    "hps.json": '["a red circle", "a big cat"]',
    "rows.json": '[{"caption": "a red circle", "n": 1}, {"caption": "a big cat", "n": 2}]',
    "rows.jsonl": '{"prompt": "a red circle"}\n{"prompt": "a big cat"}\n',
    "table.csv": 'id,text\n1,a red circle\n2,"a big cat"\n',
}


@pytest.mark.parametrize("name", FILES)
def test_prompts_are_read_from(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(FILES[name], encoding="utf-8")
    rows = read_prompts(path)
    assert [row["prompt"] for row in rows] == ["a red circle", "a big cat"]
    assert rows[0]["folder"] == str(tmp_path)
    if name == "parti.tsv":
        assert rows[1]["Category"] == "Animals" and "Prompt" not in rows[1]


def test_prompts_in_hand() -> None:
    chat = [{"role": "user", "content": "hi"}]
    assert [r["prompt"] for r in read_prompts(["one", "two"])] == ["one", "two"]
    assert read_prompts([{"prompt": chat, "tag": 3}]) == [{"tag": 3, "prompt": chat}]
    assert read_prompts([{"q": "x", "prompt": "y"}], "q") == [{"prompt": "x"}]


@pytest.mark.parametrize(
    ("given", "column", "words"),
    [
        ([], None, "at least one"),
        ([{"promt": "x"}], None, "Columns found: promt"),
        ([{"prompt": "x"}], "promt", r"no column 'promt'\. Did you mean 'prompt'"),
        ([{"prompt": "x"}, {"prompt": " "}], None, "Row 1 .* has no prompt"),
        ("nowhere/at/all.txt", None, "no file or folder"),
    ],
)
def test_lists_that_are_none_are_refused(given: object, column: str | None, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_prompts(given, column)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.docx").write_text("a")
    with pytest.raises(DataError, match=r"end in \.txt"):
        read_prompts(tmp_path / "x.docx")
