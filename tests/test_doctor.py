"""The data report: what it counts, what it says, and how it is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from alignkit.cli import app
from alignkit.doctor import examine
from alignkit.doctor.show import page, terminal
from alignkit.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("drawn_plots")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


PAIRS = [
    pair("<a>", "four", "no"),
    pair("<a>", "four", "no"),  # repeats
    pair("<a>", "no", "four"),  # contradicts
    pair("b", "longer", "abc"),
    pair("c", "same", "same"),  # identical
    pair("d", "", "x"),  # empty
    pair("e", "seven!!", "1234567"),  # equal lengths
]


def said(report: Any, level: str) -> str:
    return " ".join(f.text for f in report.findings if f.level == level)


def test_a_report_of_pairs_counts_what_is_there(tmp_path) -> None:
    report = examine(write(tmp_path / "a.jsonl", PAIRS))
    assert (report.modality, report.kind) == ("text", "pairs")
    assert dict(report.facts) == {"rows": 7, "usable": 5, "distinct prompts": 3}
    lost = {what: count for what, count, _ in report.tables[-1].rows}
    assert lost == {"chosen and rejected are the same": 1, "chosen is empty": 1}
    lengths = {row[0]: row[1:] for row in report.tables[0].rows}
    # chosen: 4, 4, 2, 6, 7; rejected: 2, 2, 4, 3, 7 characters.
    assert lengths["chosen"][1] == 4 and lengths["chosen"][-1] == pytest.approx(23 / 5)
    assert lengths["rejected"][4] == 7
    told = said(report, "warning") + said(report, "note") + said(report, "good")
    assert "1 rows repeat an earlier one" in told and "1 pairs contradict" in told
    # Of four pairs of unequal length three are longer; Wilson's interval of 3 in 4.
    assert "in 75.0% of the pairs of unequal length (95 % interval 30.1% to 95.4%)" in told
    assert "by 1 characters in the mean" in told
    assert "leave out or cut 28.6% of the rows" in told


def test_a_strong_length_bias_is_a_warning(tmp_path) -> None:
    rows = [pair(str(i), "longer", "abc") for i in range(40)]
    report = examine(write(tmp_path / "a.jsonl", rows))
    assert "will teach length" in said(report, "warning")
    fair = rows[:20] + [pair(str(i), "abc", "longer") for i in range(20, 40)]
    report = examine(fair)
    assert not said(report, "warning") and "in 50.0%" in said(report, "good")


def test_other_kinds_and_layouts(tmp_path) -> None:
    single = [{"prompt": "a", "completion": str(i), "label": i == 0} for i in range(10)]
    report = examine(single)
    assert report.kind == "single labelled answers"
    assert "10.0% of the answers are liked. KTO wants weights" in said(report, "warning")
    steer = {"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": 0}
    report = examine([steer, steer | {"preference_strength": 2}])
    assert report.facts["columns of"] == "HelpSteer2 preferences"
    assert list(report.tables[-1].rows) == [("tie", 1, "always")]
    ranked = {"prompt": "a", "responses": ["b", "c", "d"], "scores": [1, 2, 3]}
    assert examine([ranked]).kind == "rankings of K answers"
    with pytest.raises(DataError, match="columns of no kind of rows"):
        examine([{"a": 1}])
    with pytest.raises(ConfigError, match="Did you mean 'image'"):
        examine([steer], modality="images")


def test_a_tokenizer_counts_tokens_and_what_is_cut(tmp_path) -> None:
    from tests.builders import pair_rows, tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    whole = examine(pair_rows(16), tokenizer=model)
    prompts, longest = whole.histograms[0].series["prompt"], whole.histograms[1].series["rows"]
    limit = sorted(prompts)[8]
    full = sum(length >= limit for length in prompts)
    over = sum(length > limit for length in longest)
    assert 0 < full < over
    report = examine(pair_rows(16), tokenizer=model, data_options={"max_length": limit})
    assert {what: count for what, count, _ in report.tables[-1].rows} == {
        "the prompt leaves no room for an answer": full,
        "cut to max_length": over - full,
    }
    assert report.tables[0].title == "Lengths in tokens"


def test_it_is_shown_on_the_terminal_and_as_a_page(tmp_path) -> None:
    report = examine(write(tmp_path / "a<b>.jsonl", PAIRS))
    shown = terminal(report)
    assert "distinct prompts  3" in shown and "warning: 1 pairs contradict" in shown
    html = page(report)
    assert "a&lt;b&gt;.jsonl" in html and "<b>.jsonl" not in html
    assert html.count("data:image/png;base64,") == 2 and "http" not in html.split("</style>")[1]
    out = tmp_path / "page.html"
    done = CliRunner().invoke(
        app, ["doctor", "data", str(tmp_path / "a<b>.jsonl"), "--out", str(out)]
    )
    assert done.exit_code == 0 and "page:" in done.stdout and "Findings" in out.read_text()
