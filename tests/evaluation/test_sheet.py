"""The blind sheet: what is written, and what filled ones say."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from alignkit.cli import app
from alignkit.errors import ConfigError, DataError
from alignkit.evaluation import fill_sheet, read_sheets
from alignkit.evaluation.answers import Answers
from alignkit.evaluation.sheet import write_sheet

EVIL = "<script>alert('x')</script>"


def texts(num: int = 12) -> Answers:
    rows = [{"prompt": f"p{i}"} for i in range(num)]
    prompts = [f"p{i}" if i else EVIL for i in range(num)]
    before, after = [f"before {i}" for i in range(num)], [f"after {i}" for i in range(num)]
    return Answers(rows, before, after, texts=prompts)


def write(tmp_path: Path, answers: Answers | None = None, modality: str = "text") -> Path:
    return write_sheet(tmp_path / "sheet", answers or texts(), modality=modality, seed=3)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "sheet.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def rated(folder: Path, name: str, vote: dict[int, str], question: str = "general") -> None:
    """A rater's file: item -> "after", "before" or "tie"."""
    lines = []
    for row in rows_of(folder):
        wanted = vote.get(int(row["item"]))
        if wanted is None:
            continue
        side = "tie" if wanted == "tie" else "a" if row["a"].startswith(wanted) else "b"
        lines.append(json.dumps({"item": int(row["item"]), "rater": name, question: side}))
    (folder / f"{name}.jsonl").write_text("\n".join(lines))


def test_the_sheet_is_blind_and_complete(tmp_path: Path) -> None:
    folder = write(tmp_path)
    rows = rows_of(folder)
    assert list(rows[0]) == ["item", "prompt", "a", "b", "rater", "general", "alignment"]
    key = json.loads((folder / "key.json").read_text())["model_is"]
    for row, side in zip(rows, key, strict=True):
        assert row[side].startswith("after") and row["ab".replace(side, "")].startswith("before")
    assert 2 <= key.count("a") <= 10, "the order is drawn"
    assert [row["prompt"] for row in rows] != texts().texts, "so is the order of items"
    assert sorted(row["prompt"] for row in rows) == sorted(texts().texts)
    page = (folder / "index.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "model_is" not in page
    assert [json.loads(line) for line in (folder / "sheet.jsonl").read_text().splitlines()] == [
        {**row, "item": int(row["item"])} for row in rows
    ]


def test_majorities_of_five_and_win_rates(tmp_path: Path) -> None:
    folder = write(tmp_path)
    votes = {
        0: ["after"] * 3 + ["before"] * 2,
        1: ["before"] * 4 + ["after"],
        2: ["after", "after", "before", "before", "tie"],  # level
        3: ["tie"] * 3 + ["after"] * 2,  # more ties than anything
        4: ["tie", "tie", "before", "before", "before"],
    }
    for rater in range(5):
        rated(folder, f"r{rater}", {item: said[rater] for item, said in votes.items()})
    found = read_sheets(folder)
    assert dict(found.majorities["general"]) == {
        0: "model",
        1: "opponent",
        2: "tie",
        3: "tie",
        4: "opponent",
    }
    row = found.measures["general"]
    assert row.value == pytest.approx((1 + 0 + 0.5 + 0.5 + 0) / 5) and row.num == 5
    assert row.low is not None and row.low < row.value < row.high
    assert found.labels == {"general": 25, "alignment": 0}
    assert list(found.measures) == ["general"] and found.short == 12, "nobody answered the other"
    told = CliRunner().invoke(app, ["read-sheet", str(folder)]).stdout
    assert f"{100 * row.value:.1f} %" in told and "12 items have fewer labels" in told


def test_csv_as_people_write_it(tmp_path: Path) -> None:
    folder = write(tmp_path)
    rows = rows_of(folder)
    for row in rows:
        row |= {"rater": "Ann", "general": " A ", "alignment": ""}
    rows[0]["general"] = ""
    path = tmp_path / "ann.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert len(read_sheets(folder, [path]).majorities["general"]) == 11


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"item": 0, "rater": "x", "general": "left"}, "a label is a, b or tie; general says"),
        ({"item": 99, "rater": "x", "general": "a"}, "no item 99"),
        ({"item": "?", "rater": "x", "general": "a"}, "the number of an item"),
    ],
)
def test_labels_that_mean_nothing_are_refused(tmp_path: Path, line: dict, words: str) -> None:
    folder = write(tmp_path)
    (tmp_path / "bad.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match=words):
        read_sheets(folder, [tmp_path / "bad.jsonl"])


def test_nobody_votes_twice_and_an_empty_sheet_says_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path)
    with pytest.raises(DataError, match="hold no label"):
        read_sheets(folder)
    line = json.dumps({"item": 1, "rater": "Ann", "general": "a"})
    (folder / "ann.jsonl").write_text(f"{line}\n{line}\n")
    with pytest.raises(DataError, match="Ann answered item 1"):
        read_sheets(folder)
    with pytest.raises(ConfigError, match="people's labels"):
        write(tmp_path)
    with pytest.raises(ConfigError, match="wrote, with key"):
        read_sheets(tmp_path)


def test_scorers_and_judges_fill_a_sheet_of_pictures(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    pictures = Answers(
        [{"prompt": f"p{i}"} for i in range(4)],
        [blue, blue, red, red],
        [red, red, red, blue],
        texts=["p0", "p1", "p2", "p3"],
    )
    folder = write(tmp_path, pictures, "image")
    assert list(rows_of(folder)[0])[-3:] == ["general", "appeal", "alignment"]

    def redness(prompts, responses, rows):
        asked = zip(prompts, responses, strict=True)
        return [None if p == "p1" else one.getpixel((0, 0))[0] for p, one in asked]

    def judge(prompts, a, b, rows):
        return [0.9 if one.getpixel((0, 0))[2] > 0 else 0.5 for one in a]

    fill_sheet(folder, "redness", reward=redness)
    fill_sheet(folder, "blue", judge=judge, question="appeal")
    found = read_sheets(folder)
    said = sorted(found.majorities["general"].values())
    assert said == ["model", "opponent", "tie"], "p1 has no score and no label"
    assert sorted(found.majorities["appeal"].values()) == ["model", "opponent", "opponent", "tie"]
    with pytest.raises(ConfigError, match="The sheet asks general"):
        fill_sheet(folder, "x", reward=redness, question="beauty")
    with pytest.raises(ConfigError, match="one of them"):
        fill_sheet(folder, "x")
