"""The report, the model card and the summary: what they say, and that nothing in data can speak."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import yaml
from PIL import Image

from alignkit.errors import CheckpointError, ConfigError
from alignkit.facts import duration, memory, series, show
from alignkit.health import winner_alarm
from alignkit.plots import draw_plots
from alignkit.report import (
    EvaluationRow,
    ReportFacts,
    health,
    model_card,
    rebuild,
    summary_table,
    write_index,
    write_report,
)
from alignkit.run_folder import RunFolder
from alignkit.statistics import paired_difference, win_rate

pytestmark = pytest.mark.usefixtures("drawn_plots")

EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """What a browser would see: tags, attributes, text; and that every tag is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def pictures(self) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == "img"]


def facts_of(run: RunFolder, **changes: Any) -> ReportFacts:
    before = np.zeros(40)
    after = np.where(np.arange(40) < 30, 1.0, -1.0)
    facts = ReportFacts(
        title="DPO on org/model",
        method={
            "name": "dpo",
            "loss": "sigmoid",
            "equation": "L(b h - m)",
            "paper": "Rafailov et al. 2023",
            "beta": 0.1,
            "reference": "adapter off",
            "learning_rate": 5e-7,
            "batch_size": 64,
        },
        policy={"name": "org/model", "parameters": 494032768},
        data={"rows": 130, "used": 128, "skipped": {"identical answers": 2}},
        evaluation=(
            EvaluationRow.of("win rate", win_rate(before, after)),
            EvaluationRow.of("known reward", paired_difference(before, after)),
            EvaluationRow(measure="KL to the start", value=4.2134, unit="nats"),
        ),
        citations=("@article{x, title={T}}",),
        seconds=203.4,
        peak_memory_bytes=3 * 2**30,
        warnings=("3 answers were cut.",),
        environment={"torch": "2.0", "peft": None},
        run_dir=str(run.path),
    )
    return replace(facts, **changes)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "x")
    run.write_config({"seed": 7, "trainer": {"batch_size": 64}})
    for step in range(1, 9):
        record = {"step": step, "loss": 0.7 - step / 100, "grad_norm": 1.0, "learning_rate": 1e-6}
        run.append_metrics({**record, "rewards/chosen": step / 10, "rewards/accuracies": 0.6})
    run.append_metrics({"step": 8, "eval/loss": 0.66, "eval/test/loss": 0.67, "own/metric": 1})
    return run


# --- the page -------------------------------------------------------------------------------------


def test_report_says_what_was_run_and_what_came_out(run: RunFolder) -> None:
    run.write_samples(0, ["p1", "p2"], ["first before", ""])
    run.write_samples(4, ["p1", "p2"], ["first between", "second between"])
    run.write_samples(8, ["p1", "p2"], ["first after", "second after"])
    path = write_report(run, facts_of(run))
    assert path == run.path / "report.html"
    page = Page(path)
    for words in (
        "DPO on org/model",
        "75.0 % [60.0, 87.5] 40 better",
        "30 wins, 0 ties, 10 losses",
        "0 0.5 +0.5",  # before, after and their difference
        "4.21 nats",
        "time 3 min 23 s",
        "peak memory 3.0 GiB",
        "3 answers were cut.",
        "L(b h - m)",
        "0.1 per nat of the log-ratio",
        "learning rate 5e-7",
        "batch size 64",
        "reference adapter off",
        "parameters 494,032,768",
        "skipped identical answers: 2",
        "before training after step 8 p1 first before first after p2 empty second after",
        "p1 before training first before after step 4 first between after step 8 first after",
        "seed: 7",
        "peft not installed",
        "@article{x, title={T}}",
    ):
        assert words in page.text, words
    assert page.text.index("first after") < page.text.index("first between")
    # two prompts' courses, config, versions, citations
    assert [tag for tag, _ in page.tags].count("details") == 5


def test_report_needs_nothing_outside_itself(run: RunFolder) -> None:
    run.write_samples(0, ["p"], [Image.new("RGB", (8, 8), "red")])
    run.write_samples(8, ["p"], [Image.new("RGB", (8, 8), "blue")])
    page = Page(write_report(run, facts_of(run, modality="image")))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "form", "a"), tag
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
        assert tag != "img" or attributes["alt"]
    html = (run.path / "report.html").read_text()
    assert "url(" not in html and "@import" not in html


def test_plots_are_written_and_inlined(run: RunFolder) -> None:
    pictures = Page(write_report(run, facts_of(run))).pictures()
    files = sorted(path.name for path in run.plots_dir.iterdir())
    assert files == [
        "gradient-norm.png",
        "implicit-rewards.png",
        "learning-rate.png",
        "loss.png",
        "own-metric.png",
        "reward-accuracy.png",
    ]
    inlined = {base64.b64decode((p["src"] or "").split(",")[1]) for p in pictures}
    assert inlined == {path.read_bytes() for path in run.plots_dir.iterdir()}
    loss = next(p for p in pictures if (p["alt"] or "").startswith("Loss:"))
    for words in ("loss goes from 0.69 at step 1 to 0.62 at step 8", "eval/loss", "eval/test/loss"):
        assert words in (loss["alt"] or "")


def test_picture_samples_stand_side_by_side(run: RunFolder) -> None:
    colors = {0: ["red", "lime"], 8: ["blue", "white"]}
    for step, names in colors.items():
        run.write_samples(step, ["p1", "p2"], [Image.new("RGB", (1024, 512), c) for c in names])
    run.write_samples(4, ["p1", "p2"], [Image.new("RGB", (8, 8), "black")] * 2)
    page = Page(write_report(run, facts_of(run, modality="image", method={"beta": 5000.0})))
    samples = [p for p in page.pictures() if (p["alt"] or "").startswith("Sample")]
    assert [p["alt"] for p in samples[:2]] == [
        "Sample before training for the prompt: p1",
        "Sample after step 8 for the prompt: p1",
    ]
    assert [p["alt"] for p in samples[4:7]] == [
        f"Sample {step} for the prompt: p1"
        for step in ("before training", "after step 4", "after step 8")
    ]
    assert len(samples) == 4 + 6
    first = Image.open(io.BytesIO(base64.b64decode((samples[0]["src"] or "").split(",")[1])))
    assert first.size == (512, 256), "large pictures are made smaller"
    assert (samples[0]["width"], samples[0]["height"]) == ("512", "256")
    red, green, blue = np.asarray(first.convert("RGB"))[5, 5]
    assert red > 240 and green < 15 and blue < 15
    assert "5,000 mean squared denoising error with one half (Wallace et al." in page.text


def test_samples_are_matched_by_prompt(run: RunFolder) -> None:
    run.write_samples(0, ["b", "same", "same", "a"], ["b0", "s0", "t0", "a0"])
    run.write_samples(8, ["a", "same", "same", "new"], ["a8", "s8", "t8", "n8"])
    text = Page(write_report(run, facts_of(run))).text
    assert "a a0 a8 same s0 s8 same t0 t8 new empty n8" in text


def test_many_samples_and_steps_are_cut_and_counted(run: RunFolder) -> None:
    for step in range(20):
        run.write_samples(step, [f"p{i}" for i in range(30)], [f"said at {step}"] * 30)
    page = Page(write_report(run, facts_of(run)))
    assert "6 more in the folder samples/." in page.text
    assert page.text.count("10 more steps in the folder samples/.") == 24
    assert [tag for tag, _ in page.tags].count("details") == 24 + 3
    shown = [step for step in range(20) if f"after step {step} said at {step}" in page.text]
    assert len(shown) == 9 and shown[-1] == 19, "and the one before training"


def test_each_prompt_is_followed_through_training(run: RunFolder) -> None:
    """Its answers at every step, whatever its place among the prompts was then."""
    run.write_samples(0, ["p", "q"], ["p0", "q0"], [3, 900], [False, True])
    run.write_samples(5, ["q", "p"], ["q5", "p5"], [7, 2], [False, False])
    run.write_samples(8, ["p", "q"], ["p8", "q8"], [4, 4], [False, False])
    text = Page(write_report(run, facts_of(run))).text
    course = "p before training 3 tokens p0 after step 5 2 tokens p5 after step 8 4 tokens p8"
    assert course in text
    assert "q before training 900 tokens, cut q0 after step 5 7 tokens q5" in text
    # Median, 95th percentile, longest, cut: of 3 and 900, of 2 and 7, of 4 and 4.
    assert "before training 452 855 900 50 %" in text
    assert "after step 5 4 7 7 0 % after step 8 4 4 4 0 %" in text


def test_everything_from_outside_is_escaped(run: RunFolder) -> None:
    run.append_metrics({"step": 9, EVIL: 1.0, "$\\frac{": 2.0, "eval/" + EVIL: 0.5})
    run.write_samples(0, [EVIL], [EVIL])
    run.write_samples(8, [EVIL], [EVIL + "after"])
    run.write_config({EVIL: EVIL})
    evil = {EVIL: EVIL, "skipped": {EVIL: EVIL}}
    rows = (EvaluationRow(measure=EVIL, value=1.0, unit=EVIL, note=EVIL),)
    facts = facts_of(
        run,
        title=EVIL,
        method={**evil, "name": EVIL, "equation": EVIL, "beta": EVIL, "beta_convention": EVIL},
        policy=evil,
        data=evil,
        evaluation=rows,
        citations=(EVIL,),
        warnings=(EVIL,),
        environment={EVIL: EVIL},
        finished=EVIL,
    )
    path = write_report(run, facts)
    page = Page(path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [attrs for _, attrs in page.tags if "onerror" in attrs]
    html = path.read_text()
    assert "<script" not in html and "<img src=x" not in html
    assert page.text.count(EVIL) >= 20, "and it can still be read"


def test_report_of_almost_nothing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "x")
    page = Page(write_report(run, ReportFacts(title="Bare")))
    assert "Bare" in page.text
    assert page.pictures() == []
    for heading in ("Result", "Samples", "Curves", "again"):
        assert heading not in page.text


def test_index_shows_every_run_and_links_to_its_report(tmp_path: Path) -> None:
    runs = [RunFolder(tmp_path / name) for name in ("text run", "images")]
    runs[0].write_samples(0, ["p"], ["the answer " + EVIL])
    runs[1].write_samples(0, ["q"], [Image.new("RGB", (4, 4))])
    titles = ("first " + EVIL, "second")
    facts = [facts_of(run, title=title) for run, title in zip(runs, titles, strict=True)]
    for run, its_facts in zip(runs, facts, strict=True):
        write_report(run, its_facts)
    page = Page(write_index(tmp_path / "report.html", facts, title="both " + EVIL))
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert links == ["text%20run/report.html", "images/report.html"]
    assert all((tmp_path / unquote(link or "")).exists() for link in links)
    assert [p["alt"] for p in page.pictures()] == ["Sample before training for the prompt: q"]
    assert page.text.count("75.0 %") == 2
    assert page.text.count(EVIL) >= 3 and "script" not in {tag for tag, _ in page.tags}


# --- again from the folder alone ------------------------------------------------------------------


def test_rebuild_gives_the_same_report(run: RunFolder) -> None:
    facts = facts_of(run)
    run.write_samples(0, ["p"], ["a"])
    html = write_report(run, facts).read_text()
    run.write_result({"steps": 8, "facts": facts.as_dict()})
    (run.path / "report.html").unlink()
    assert rebuild(run.path).read_text() == html
    assert ReportFacts.from_dict(json.loads(json.dumps(facts.as_dict()))).evaluation == (
        facts.evaluation
    )


def test_rebuild_of_a_moved_folder_names_the_new_place(run: RunFolder) -> None:
    run.write_result({"facts": facts_of(run).as_dict()})
    moved = run.path.rename(run.path.with_name("moved"))
    assert f"from {moved}" in Page(rebuild(moved)).text


def test_rebuild_of_an_unfinished_run_says_so(run: RunFolder) -> None:
    run.write_samples(0, ["p"], [Image.new("RGB", (4, 4))])
    page = Page(rebuild(run.path))
    assert "This run has not finished" in page.text
    assert "image model" in page.text
    assert len(page.pictures()) == 7


def test_rebuild_refuses_what_is_no_run(tmp_path: Path, run: RunFolder) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ConfigError, match=r"is none\. Give the run_dir"):
            rebuild(path)
    assert not (tmp_path / "nothing").exists()
    for result in ({"steps": 1}, {"facts": {"modality": "text"}}):
        run.write_result(result)
        with pytest.raises(CheckpointError, match=r"result\.json"):
            rebuild(run.path)


def test_facts_of_another_version_are_read() -> None:
    row = {"measure": "m", "value": 1.0, "from_the_future": 1}
    facts = ReportFacts.from_dict({"title": "t", "evaluation": [row], "from_the_future": 1})
    assert facts.title == "t" and facts.evaluation[0].measure == "m"


# --- evaluation rows, numbers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "neutral", "better", "verdict"),
    [
        (0.51, 0.6, 0.5, "higher", "better"),
        (0.3, 0.49, 0.5, "higher", "worse"),
        (0.49, 0.6, 0.5, "higher", "no clear change"),
        (0.1, 0.2, 0.0, "lower", "worse"),
        (-0.2, -0.1, 0.0, "lower", "better"),
        (0.1, 0.2, 0.0, None, ""),
        (None, None, 0.5, "higher", ""),
    ],
)
def test_verdict(low: Any, high: Any, neutral: Any, better: Any, verdict: str) -> None:
    row = EvaluationRow(measure="m", value=0.5, low=low, high=high, neutral=neutral, better=better)
    assert row.verdict == verdict


def test_row_of_a_win_rate_reads_like_the_win_rate() -> None:
    rate = win_rate([0.0, 1.0, None, 0.0], [1.0, 0.0, 1.0, 1.0])
    assert str(EvaluationRow.of("m", rate)) == str(rate)
    row = EvaluationRow.of("m", paired_difference([1.0], [3.5]), unit="points", better=None)
    assert str(row) == "+2.5 points [+2.5, +2.5], n=1"
    assert (row.before, row.after, row.verdict) == (1.0, 3.5, "")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5e-7, "5e-7"),
        (0.1, "0.1"),
        (5000.0, "5,000"),
        (12345.678, "12,346"),
        (0.6931471, "0.6931"),
        (-0.0, "0"),
        (3.2e12 + 0.5, "3.2e12"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
        (1234567, "1,234,567"),
        (True, "yes"),
        (None, "none"),
        ([], "none"),
        ({"too_long": 2, "b": [1, "x"]}, "too long: 2; b: 1, x"),
    ],
)
def test_show(value: Any, text: str) -> None:
    assert show(value) == text


def test_durations_and_memory() -> None:
    assert [duration(s) for s in (4.25, 9.96, 59.4, 59.7, 200, 7500)] == [
        "4.2 s",
        "10 s",
        "59 s",
        "1 min 00 s",
        "3 min 20 s",
        "2 h 05 min",
    ]
    assert [memory(b) for b in (300 * 2**20, 3 * 2**29)] == ["300 MiB", "1.5 GiB"]


def test_series_keeps_numbers_only() -> None:
    records: list[dict[str, Any]] = [
        {"step": 2, "a": 1, "b": None, "c": "x", "d": True},
        {"step": 4, "a": 0.5, "b": 3},
    ]
    assert series(records) == {"a": [(2.0, 1.0), (4.0, 0.5)], "b": [(4.0, 3.0)]}


# --- curves and health ----------------------------------------------------------------------------


def test_too_many_panels_are_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.plots._MOST", 2)
    plots, left_out = draw_plots([{"step": 1, "loss": 1, "m/0": 0, "m/1": 1, "m/2": 2}])
    assert [plot.title for plot in plots] == ["Loss", "m/0"]
    assert left_out == ["m/1", "m/2"]


def test_panels_of_similar_names_get_their_own_files() -> None:
    plots, _ = draw_plots([{"step": 1, "a/b": 1, "a-b": 2, "ü": 3}])
    assert len({plot.file for plot in plots}) == 3
    assert all(re.fullmatch(r"[a-z0-9-]+\.png", plot.file) for plot in plots)


def test_long_curves_keep_their_level() -> None:
    from alignkit.plots import _running_mean

    assert _running_mean([2.0] * 100) == pytest.approx([2.0] * 100)
    ramp = [float(i) for i in range(100)]
    assert _running_mean(ramp)[10:90] == pytest.approx(ramp[10:90])


def test_metrics_of_one_idea_share_a_panel() -> None:
    names = ["log_ratio/chosen", "eval/hard/log_ratio/rejected", "eval/accuracy/t0-250"]
    names += ["eval/hard/accuracy/t250-500", "error/chosen", "samples/tokens_median", "samples/cut"]
    plots, _ = draw_plots([{"step": 1, **dict.fromkeys(names, 1.0)}])
    found = {plot.title: plot.alt for plot in plots}
    assert list(found) == [
        "Accuracy by timestep",
        "Log-ratio to the reference",
        "Denoising error above the reference's",
        "Length of samples in tokens",
        "Samples cut by the limit",
    ]
    assert all(name in found["Log-ratio to the reference"] for name in names[:2])
    assert all(name in found["Accuracy by timestep"] for name in names[2:4])


ALARM = "The winner gets worse"


@pytest.mark.parametrize(
    ("errors", "alarm"),
    [
        ([0.1, 0.2, 0.3], True),  # from no difference up, three times
        ([0.1, 0.2], False),  # too early to say
        ([0.1, 0.3, 0.2, 0.4], False),  # it came down in between
        ([0.3, 0.2, 0.1, 0.05], False),
        ([-0.4, -0.3, -0.2, -0.1], False),  # better than the reference all along
        ([-0.2, 0.5, 0.1, 0.2, 0.3], False),  # once it fell, it must grow three times anew
        ([-0.2, 0.5, 0.1, 0.2, 0.3, 0.4], True),
    ],
)
def test_the_alarm_of_a_winner_that_keeps_getting_worse(errors: list[float], alarm: bool) -> None:
    for name in ("eval/error/chosen", "eval/hard/error/chosen"):
        found = winner_alarm(curve(**{name: errors}))
        assert (found is not None) == alarm
        assert not alarm or (name in found and ALARM in found)
    assert winner_alarm(curve(**{"eval/error/rejected": errors})) is None
    assert any(ALARM in w for w in health(curve(**{"eval/error/chosen": errors}))) == alarm


def test_without_held_out_rows_the_alarm_reads_the_training_curve() -> None:
    noise = np.random.default_rng(0).normal(0, 0.3, 200)
    ramp = np.linspace(0, 1, 200)
    assert ALARM in (winner_alarm(curve(**{"error/chosen": list(ramp + noise)})) or "")
    for drift in (0 * ramp, -ramp, np.where(ramp < 0.5, ramp, 1 - ramp)):
        assert winner_alarm(curve(**{"error/chosen": list(drift + noise)})) is None
    # A held-out set that says otherwise is believed.
    both = {"error/chosen": list(ramp), "eval/error/chosen": [0.0] * 200}
    assert winner_alarm(curve(**both)) is None


def curve(**metrics: list[Any]) -> list[dict[str, Any]]:
    length = max(len(values) for values in metrics.values())
    names = {name: name.replace("__", "/") for name in metrics}
    return [
        {"step": i + 1, **{names[n]: v[i] for n, v in metrics.items() if i < len(v)}}
        for i in range(length)
    ]


def test_health_of_a_good_run_is_silent() -> None:
    steps = range(40)
    records = curve(
        loss=[0.69 - 0.005 * i for i in steps],
        grad_norm=[1.0] * 40,
        rewards__chosen=[-0.01 * i for i in steps],
        rewards__accuracies=[0.5 + 0.01 * i for i in steps],
    )
    assert health(records) == []
    assert health([]) == []


def test_health_finds_likelihood_displacement() -> None:
    chosen, rising = [-0.1 * i for i in range(40)], [0.5 + 0.01 * i for i in range(40)]
    (warning,) = health(curve(rewards__chosen=chosen, rewards__accuracies=rising))
    assert warning.startswith("Likelihood displacement") and "-3.45" in warning
    assert health(curve(rewards__chosen=chosen, rewards__accuracies=rising[::-1])) == []
    mild = [value / 2 for value in chosen]
    assert health(curve(rewards__chosen=mild, rewards__accuracies=rising)) == []


def test_health_finds_a_loss_that_never_moved() -> None:
    (warning,) = health(curve(loss=[0.693147] * 10))
    assert "never moved from 0.6931" in warning
    assert health(curve(loss=[0.693147] * 4)) == []
    assert health(curve(loss=[0.6931 - 0.0003 * i for i in range(10)])) == []


def test_health_finds_what_is_not_finite() -> None:
    (warning,) = health(curve(loss=[0.7, 0.6, None], grad_norm=[1.0, None, 1.0]))
    assert "not finite at step 2" in warning


def test_health_finds_swapped_labels_and_overfitting() -> None:
    (warning,) = health(curve(rewards__accuracies=[0.5, 0.4, 0.3, 0.2, 0.1]))
    assert "prefer" in warning and "0.10" in warning
    records = curve(rewards__accuracies=[0.6, 0.9, 1.0, 1.0])
    records.append({"step": 4, "eval/rewards/accuracies": 0.7})
    (warning,) = health(records)
    assert warning.startswith("Overfitting") and "0.70" in warning


def test_health_warnings_reach_the_report(run: RunFolder) -> None:
    for step in range(9, 60):
        run.append_metrics({"step": step, "rewards/chosen": -5.0, "rewards/accuracies": 0.9})
    assert "Likelihood displacement" in Page(write_report(run, facts_of(run))).text


# --- model card -----------------------------------------------------------------------------------

TEXT_LORA = ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json")
TEXT_FULL = ("config.json", "model.safetensors", "tokenizer.json")
IMAGE_LORA = ("pytorch_lora_weights.safetensors", "kohya.safetensors")
IMAGE_FULL = ("model_index.json", "unet/config.json")


def front_matter(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def code_of(card: str) -> str:
    return card.split("```python\n")[1].split("\n```")[0]


@pytest.mark.parametrize(
    ("modality", "files", "library", "calls"),
    [
        ("text", TEXT_LORA, "peft", ["PeftModel.from_pretrained(base, folder)"]),
        ("text", TEXT_FULL, "transformers", ["AutoModelForCausalLM.from_pretrained(folder)"]),
        ("image", IMAGE_LORA, "diffusers", ["pipeline.load_lora_weights(folder)"]),
        ("image", IMAGE_FULL, "diffusers", ["DiffusionPipeline.from_pretrained(folder)"]),
    ],
)
@pytest.mark.parametrize("base", ["org/model", None])
def test_model_card(
    run: RunFolder, modality: str, files: Any, library: str, calls: list[str], base: str | None
) -> None:
    card = model_card(facts_of(run), base=base, modality=modality, files=files)
    front = front_matter(card)
    assert front["library_name"] == library
    assert front.get("base_model") == base
    assert {"alignkit", "dpo"} <= set(front["tags"])
    assert ("lora" in front["tags"]) == (files in (TEXT_LORA, IMAGE_LORA))
    code = code_of(card)
    compile(code, "card", "exec")
    for call in calls:
        assert call in code
    if base and files in (TEXT_LORA, IMAGE_LORA):
        assert ".from_pretrained('org/model')" in code
    assert ("`kohya.safetensors`" in card) == (files == IMAGE_LORA)
    for words in ("75.0 %", "learning rate | 5e-7", "per nat", "@article{x", "Intended use"):
        assert words in card, words


def test_the_card_of_a_reward_model_loads_it_as_what_it_is(run: RunFolder) -> None:
    facts = facts_of(run, policy={"class": "LlamaForSequenceClassification"})
    for files in (TEXT_FULL, TEXT_LORA):
        card = model_card(facts, base="org/model", modality="text", files=files)
        assert front_matter(card)["pipeline_tag"] == "text-classification"
        assert "AutoModelForSequenceClassification.from_pretrained(" in code_of(card)
        assert "AutoModelForCausalLM" not in card and "score answers" in card
        compile(code_of(card), "card", "exec")


def test_model_card_of_a_local_base_names_no_hub_model(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for base in ("runs/sft", "/abs/path", "a/b/c"):
        card = model_card(facts_of(run), base=base, modality="text", files=TEXT_FULL[:2])
        assert "base_model" not in front_matter(card)
        told = base.removeprefix("/abs/")
        assert f"AutoTokenizer.from_pretrained('{told}')" in card  # none was saved beside it


def test_a_card_tells_nobody_where_its_maker_keeps_things(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is pushed with the model."""
    monkeypatch.chdir(tmp_path)
    facts = facts_of(
        run,
        policy={"name": f"{tmp_path}/base"},
        data={"source": "/home/somebody/secret/pairs.jsonl"},
        run_dir=str(tmp_path / "runs" / "x"),
    )
    card = model_card(facts, base="/home/somebody/base", modality="text", files=TEXT_LORA)
    assert "/home" not in card and str(tmp_path) not in card
    for told in ("'runs/x/model'", "from_pretrained('base')", "| pairs.jsonl |"):
        assert told in card, told


def test_model_card_escapes(run: RunFolder) -> None:
    evil = 'x"\n---\ntags: [evil]\n# <script>alert(1)</script> ``` | `'
    facts = facts_of(
        run,
        title=evil,
        method={"name": evil, evil: evil},
        citations=(evil,),
        evaluation=(EvaluationRow(measure=evil, value=1.0),),
        run_dir=evil,
    )
    card = model_card(facts, base=evil, modality="text", files=["config.json"])
    front = front_matter(card)
    assert front["tags"] == ["alignkit", " ".join(evil.split())]
    compile(code_of(card), "card", "exec")
    assert card.count("\n```") == 4  # two blocks, each opened and closed
    prose = card.split("## Citations")[0].replace(code_of(card), "")
    assert "<script" not in prose.split("---\n\n", 1)[1]


# --- summary and import ---------------------------------------------------------------------------


def test_summary_is_aligned_and_ends_with_the_path(run: RunFolder) -> None:
    lines = summary_table(facts_of(run)).splitlines()
    assert lines[0] == "DPO on org/model"
    assert lines[1] == "  win rate         75.0 % [60.0, 87.5], n=40  better"
    assert lines[3] == "  KL to the start  4.21 nats"
    assert lines[4] == "  time             3 min 23 s"
    assert lines[-2] == "  warning: 3 answers were cut."
    assert lines[-1] == f"Report: {run.path / 'report.html'}"
    assert summary_table(ReportFacts(title="t", run_dir="r")) == "t\nReport: r/report.html"


def test_import_is_light() -> None:
    code = "import sys, alignkit.report; sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
