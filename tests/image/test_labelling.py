"""Scores beside the rows, and training on them."""

import io
import json
import math

import pyarrow.parquet
import pytest
from PIL import Image

from alignkit import DPO, ConfigError, DataError, ImageOptions, TrainerOptions, align
from alignkit.columns import Sieve
from alignkit.errors import CheckpointError
from alignkit.options import ScoreLabels
from alignkit_diffusion.labelling import score_images
from alignkit_diffusion.rows import open_rows, read_examples


def picture(level):
    return Image.new("RGB", (16, 16), (level, 0, 0))


def encoded(image):
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def redness(prompts, images, rows):
    return [image.getpixel((0, 0))[0] for image in images]


@pytest.fixture
def rows():
    """Pick-a-Pic rows whose people like the darker image, all but one tie."""
    levels = [(10, 200), (250, 30), (60, 60), (90, 91)]
    return [
        {
            "caption": f"a red square {number}",
            "jpg_0": encoded(picture(a)),
            "jpg_1": encoded(picture(b).transpose(Image.Transpose.ROTATE_90)),
            "label_0": 1.0 if a < b else 0.0 if a > b else 0.5,
        }
        for number, (a, b) in enumerate(levels)
    ]


def read(rows, **options):
    options = ImageOptions(identical_pairs="keep", **options)
    opened = open_rows(rows, options, "pairs")
    sieve = Sieve(opened, options.on_bad_row)
    found = read_examples(opened, "pairs", options, sieve, lambda _: lambda *_: None)
    return [row for row, _ in found], sieve


def test_scores_stand_beside_the_rows_in_their_columns_order(rows, tmp_path):
    score_images(rows, {"red": redness}, tmp_path / "scores")
    table = pyarrow.parquet.read_table(tmp_path / "scores" / "part-000000.parquet").to_pydict()
    assert table["row"] == [0, 1, 2, 3]
    assert table["red"] == [[10, 200], [250, 30], [60, 60], [90, 91]]
    assert all(len(digests) == 2 for digests in table["digests"])


def test_training_believes_the_scores(rows, tmp_path):
    folder = str(score_images(rows, {"red": redness}, tmp_path / "scores"))
    people, _ = read(rows)
    assert [row.pictures[0].column for row in people] == ["jpg_0", "jpg_1", "jpg_0"]
    hard, sieve = read(rows, labels=ScoreLabels(folder=folder, scorer="red"))
    assert [row.pictures[0].column for row in hard] == ["jpg_1", "jpg_0", "jpg_1"]
    assert [row.label.score for row in hard] == [(200, 10), (250, 30), (91, 90)]
    assert sum(sieve.skipped.values()) == 1
    labels = ScoreLabels(folder=folder, scorer={"red": 0.5}, soft=True, temperature=2)
    soft, _ = read(rows, labels=labels, ties="half")
    gaps = [190, 220, 0, 1]
    expected = [1 / (1 + math.exp(-gap / 4)) for gap in gaps]
    assert [row.label.numbers["p_chosen"] for row in soft] == pytest.approx(expected)


def test_rows_without_peoples_labels_are_usable(rows, tmp_path):
    for row in rows:
        row["label_0"] = None
    folder = str(score_images(rows, {"red": redness}, tmp_path / "scores"))
    found, _ = read(rows, labels=ScoreLabels(folder=folder, scorer="red"))
    assert len(found) == 3


def test_scoring_goes_on_where_it_was(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("alignkit_diffusion.labelling.PART", 2)
    monkeypatch.setattr("alignkit_diffusion.score_labels.PART", 2)
    asked = []

    def dies_once(prompts, images, given):
        asked.append(len(images))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return redness(prompts, images, given)

    with pytest.raises(KeyboardInterrupt):
        score_images(rows, {"red": dies_once}, tmp_path / "scores")
    labels = ScoreLabels(folder=str(tmp_path / "scores"), scorer="red")
    with pytest.raises(DataError, match="goes on where it was"):
        read(rows, labels=labels)
    score_images(rows, {"red": dies_once}, tmp_path / "scores")
    assert asked == [4, 4, 4]
    assert len(read(rows, labels=labels)[0]) == 3


def test_other_scorers_data_and_images_are_refused(rows, tmp_path):
    folder = score_images(rows, {"red": redness}, tmp_path / "scores")
    with pytest.raises(CheckpointError, match="blue"):
        score_images(rows, {"blue": redness}, folder)
    with pytest.raises(ConfigError, match="red"):
        read(rows, labels=ScoreLabels(folder=str(folder), scorer="rad"))
    with pytest.raises(DataError, match="do not belong together"):
        read(rows[:2], labels=ScoreLabels(folder=str(folder), scorer="red"))
    rows[0]["jpg_0"] = encoded(picture(11))
    with pytest.raises(DataError, match="not those that were scored"):
        read(rows, labels=ScoreLabels(folder=str(folder), scorer="red"))
    with pytest.raises(ConfigError, match="there is no"):
        read(rows, labels=ScoreLabels(folder=str(tmp_path / "none"), scorer="red"))


def test_a_broken_image_has_no_score_and_is_counted(rows, tmp_path, caplog):
    rows[1]["jpg_1"] = b"broken"
    folder = score_images(rows, {"red": redness}, tmp_path / "scores")
    assert "without scores: 1" in caplog.text
    labels = ScoreLabels(folder=str(folder), scorer="red")
    found, sieve = read(rows, labels=labels, on_bad_row="skip")
    assert [row.number for row in found] == [0, 3]
    assert sieve.skipped["no score"] == 1


def test_a_scorer_that_fails_is_told(rows, tmp_path):
    for bad, match in (([1.0], "one number per prompt"), ([float("nan")] * 8, "finite")):
        with pytest.raises(DataError, match=match):
            score_images(rows, {"bad": lambda *_, bad=bad: bad}, tmp_path / match)


def test_a_run_learns_from_scores(rows, tmp_path, pipeline_folder):
    folder = str(score_images(rows, {"red": redness}, tmp_path / "scores"))
    options = ImageOptions(labels=ScoreLabels(folder=folder, scorer="red", soft=True))
    trainer = TrainerOptions(max_steps=1, batch_size=2)
    result = align(str(pipeline_folder), DPO(), rows, data_options=options, trainer=trainer)
    assert result.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_command_scores_and_yaml_reads(rows, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from alignkit.cli import app
    from alignkit.schema import build

    for number, row in enumerate(rows):
        for name in ("jpg_0", "jpg_1"):
            (tmp_path / f"{number}-{name}.png").write_bytes(row[name])
            row[name] = f"{number}-{name}.png"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "my_scorer.py").write_text(
        "def red(prompts, images, rows):\n    return [i.getpixel((0, 0))[0] for i in images]\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["label", "images", "rows.jsonl", "--scorer", "my_scorer:red", "--out", "scores"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    given = {"labels": {"folder": "scores", "scorer": "red", "soft": True}}
    options = build(ImageOptions, given, "data_options")
    assert options.labels == ScoreLabels(folder="scores", scorer="red", soft=True)
    assert len(read("rows.jsonl", labels=options.labels)[0]) == 3
