"""What the doctor sees in image rows."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from alignkit.cli import app
from alignkit.doctor import examine
from alignkit.doctor.show import page, terminal
from alignkit.errors import DataError
from tests.image.conftest import picture


def jpeg(number: int, width: int = 24, height: int = 24) -> bytes:
    buffer = io.BytesIO()
    picture(number, width, height).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def pick(
    first: int, second: int, label: float, prompt: str = "a cat", **more: Any
) -> dict[str, Any]:
    images = {"jpg_0": jpeg(first), "jpg_1": jpeg(second)}
    return {"caption": prompt, **images, "label_0": label, **more}


ROWS = [
    pick(0, 1, 1),
    pick(2, 3, 1, "a dog"),
    pick(0, 1, 0),  # row 0 the other way round
    pick(2, 3, 1, "A  dog"),  # row 1 again
    pick(4, 5, 0.5),
    pick(6, 6, 1),
    {**pick(7, 8, 1), "jpg_1": b"broken"},
    pick(9, 10, 1, has_label=False),
    {**pick(11, 12, 1, "big"), "jpg_0": jpeg(11, 64, 16)},
]


def test_rows_of_pick_a_pic_are_examined() -> None:
    report = examine(ROWS, data_options={"resolution": 20})
    assert report.modality == "image" and report.kind == "pairs"
    facts = report.facts
    assert facts["rows"] == 9 and facts["usable rows"] == 5
    assert facts["distinct images"] == 6 and facts["distinct prompts"] == 3
    told = {table.title: dict(table.rows) for table in report.tables}
    assert told["Rows that a run leaves out, or refuses"] == {
        "tie": 1,
        "unreadable image": 1,
        "chosen and rejected are the same": 1,
        "no label (has_label is false)": 1,
    }
    assert told["Sizes, width x height"] == {"24 x 24": 5, "64 x 16": 1}
    assert told["Which column holds the better image"] == {"jpg_0": 4, "jpg_1": 1}
    text = "\n".join(f"{finding.level}: {finding.text}" for finding in report.findings)
    assert "1 of 9 rows (11.1%) are ties" in text
    assert "note: 1 of 9 rows have nothing but the same image" in text
    assert "warning: Rows that cannot be used: 1 unreadable image, 1 no label" in text
    assert "warning: 1 pairs are there both ways round" in text and "rows 0, 2" in text
    assert "note: 1 rows repeat another one" in text and "rows 1, 3" in text
    assert "jpg_0 holds the better image in 80%" in text
    assert "1 of 6 images are smaller than 20 pixels" in text
    assert "1 of 6 images are far from square" in text
    (gallery,) = report.galleries
    assert gallery.rows[0][0] == "Row 0: a cat"
    assert all(len(pictures) == 2 for _, pictures in gallery.rows)
    captions = [shown.caption for shown in gallery.rows[0][1]]
    assert captions == ["chosen: jpg_0, 24 x 24", "rejected: jpg_1, 24 x 24"]
    shown = Image.open(io.BytesIO(gallery.rows[0][1][0].data))
    assert shown.size == (24, 24)
    assert "usable rows" in terminal(report).lower()
    html = page(report)
    assert html.count("data:image/jpeg;base64") == 10


def test_clean_rows_are_said_to_be_clean() -> None:
    rows = [{"prompt": f"{i}", "image": picture(i, 24, 24), "label": i % 2} for i in range(4)]
    report = examine(rows, data_options={"resolution": 16, "held_out_share": 0.5})
    assert report.kind == "single images"
    text = " ".join(finding.text for finding in report.findings)
    assert "Every image can be decoded" in text and "2 of 4 images are liked" in text
    assert report.facts["held-out rows"] == report.facts["held-out prompts"]
    with pytest.raises(DataError, match="no columns of image rows"):
        examine([{"prompt": "", "image_path": ["a"]}])


def test_the_command_writes_a_page(tmp_path: Path) -> None:

    picture(0).save(tmp_path / "a.png")
    picture(1).save(tmp_path / "b.png")
    row = {"prompt": "a cat", "chosen": "a.png", "rejected": "b.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    command = ["doctor", "data", str(tmp_path), "--out", str(tmp_path / "page.html")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "usable rows" in result.output.lower()
    assert "data:image/jpeg" in (tmp_path / "page.html").read_text()
