"""The command line: its commands, what they call, and how they refuse."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
import yaml
from typer.testing import CliRunner

import alignkit
from alignkit.cite import citations, cited_modalities
from alignkit.cli import app
from alignkit.config import check, from_file, from_mapping
from alignkit.errors import ConfigError, DataError
from alignkit.losses import LOSSES
from alignkit.methods import METHODS
from alignkit.options import GenerationOptions
from alignkit.run_schema import json_schema

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

COMMANDS = {
    "train": {"file", "overrides", "--dry-run"},
    "demo": {"--out", "--quick"},
    "sample": {"run_or_model", "prompts", "--seed", "--generation", "--out"},
    "report": {"run"},
    "evaluate": {
        "run_or_model",
        "--against",
        "--data",
        "--prompts",
        "--prompt-column",
        "--num-prompts",
        "--reward",
        "--judge",
        "--edit",
        "--sheet",
        "--out",
        "--generation",
        "--data-option",
        "--precision",
        "--seed",
    },
    "read-sheet": {"folder", "filled"},
    "methods": set(),
    "losses": {"--markdown"},
    "cite": {"file_or_method"},
    "schema": set(),
    "export": {"run_or_model", "--merged", "--base"},
    "cache reference": {"config_or_model", "rest", "--folder"},
    "cache images": {
        *("data_or_config", "rest", "--model", "--folder", "--kind", "--verify"),
    },
    "label images": {"data", "--scorer", "--out", "--device", "--column"},
    "label samples": {
        "model",
        "prompts",
        "--scorer",
        "--out",
        "--per-prompt",
        "--adapter",
        "--seed",
        "--generation",
        "--column",
    },
    "doctor data": {"file", "--tokenizer", "--out", "--kind", "--modality", "--options"},
}


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def api(monkeypatch):
    """What the commands call, recorded; nothing is loaded and nobody is asked over the network."""
    calls = []

    def align(**arguments):
        calls.append(arguments)
        metrics = {"rewards/accuracies": 0.75}
        return SimpleNamespace(metrics=metrics, run_dir=Path("runs/x"), report=Path("r.html"))

    def modality_of(policy):
        if "broken" in policy:
            raise ConfigError("policy is neither an LLM nor a diffusers pipeline.")
        return "image" if "xl" in policy else "text"

    fake = SimpleNamespace(align=align, modality_of=modality_of, calls=calls)
    monkeypatch.setitem(sys.modules, "alignkit.api", fake)
    monkeypatch.setattr(alignkit, "api", fake, raising=False)
    return fake


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("policy: my/model\nmethod: dpo\ndata: pairs.jsonl\nrun_dir: runs/x\n")
    return path


# --- the surface -------------------------------------------------------------------------------


def test_commands_and_options_are_these():
    command = typer.main.get_command(app)
    found: dict[str, set[str]] = {}
    for name, sub in command.commands.items():
        group = {f"{name} {last}": one for last, one in getattr(sub, "commands", {}).items()}
        for path, one in (group or {name: sub}).items():
            found[path] = {p.opts[0] if p.opts[0].startswith("-") else p.name for p in one.params}
    assert found == COMMANDS
    assert {p.opts[0] for p in command.params} == {"--version", "--debug"}


def test_version_and_help():
    assert call("--version").stdout == f"alignkit {alignkit.__version__}\n"
    shown = call("--help").stdout
    assert all(name.split()[0] in shown for name in COMMANDS)


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "alignkit", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"alignkit {alignkit.__version__}\n"


# --- train -------------------------------------------------------------------------------------


def test_train_calls_align_with_the_file_and_the_overrides(api, file):
    done = call("train", file, "trainer.max_steps=3", "adapter.rank=4")
    assert done.exit_code == 0, done.output
    (arguments,) = api.calls
    expected = from_file(file, ["trainer.max_steps=3", "adapter.rank=4"])
    assert arguments == vars(expected)
    assert "rewards/accuracies: 0.75" in done.stdout
    assert "run folder: runs/x" in done.stdout


def test_dry_run_prints_a_configuration_that_runs_and_loads_nothing(api, file):
    done = call("train", file, "trainer.max_steps=3", "--dry-run")
    assert done.exit_code == 0, done.output
    assert api.calls == []
    printed = yaml.safe_load(done.stdout)
    assert printed["resolved"] == {"modality": "text"}
    assert printed["trainer"]["batch_size"] == 64
    assert from_mapping(printed) == from_file(file, ["trainer.max_steps=3"])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_repository_dry_runs(api, config):
    done = call("train", config, "--dry-run")
    assert done.exit_code == 0, done.output
    printed = yaml.safe_load(done.stdout)
    check(from_mapping(printed), printed["resolved"]["modality"])
    given = yaml.safe_load(config.read_text())
    assert printed["policy"] == given["policy"]
    assert printed["resolved"]["modality"] == ("image" if "sdxl" in config.name else "text")


def test_there_are_configs_to_look_at():
    assert {"text_dpo.yaml", "sdxl_dpo.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_short_and_says_what_it_shows_needs_and_takes(config):
    lines = config.read_text().splitlines()
    assert len(lines) <= 40
    schema = lines[0].removeprefix("# yaml-language-server: $schema=")
    assert (config.parent / schema).samefile(ROOT / "configs" / "schema.json")
    opening = "\n".join(lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")])
    for word in ("Shows:", "Needs:", "Takes:", f"alignkit train configs/{config.name}"):
        assert word in opening


def test_the_schema_file_is_up_to_date():
    written = (ROOT / "configs" / "schema.json").read_text()
    assert written == call("schema").stdout, "run: alignkit schema > configs/schema.json"
    assert yaml.safe_load(written) == json_schema()


# --- refusals ----------------------------------------------------------------------------------


def test_errors_of_users_are_one_message_without_traceback(api, file):
    done = call("train", file, "trainer.max_step=3")
    assert done.exit_code == 2
    assert done.stderr.startswith("ConfigError: ")
    assert "trainer.max_step is not an option. Did you mean 'max_steps'?" in done.stderr
    assert "Traceback" not in done.output
    assert api.calls == []


def test_a_dry_run_checks_combinations(api, file):
    done = call("train", file, "reference=adapter_off", "--dry-run")
    assert done.exit_code == 2
    assert "reference='adapter_off' compares" in done.stderr
    done = call("train", file, "policy=broken", "--dry-run")
    assert (done.exit_code, "neither an LLM" in done.stderr) == (2, True)


def test_errors_while_training_are_one_message_too(api, file, monkeypatch):
    def fail(**arguments):
        raise DataError("row 3 has no [prompt].")

    monkeypatch.setattr(api, "align", fail)
    done = call("train", file)
    assert (done.exit_code, done.stderr) == (2, "DataError: row 3 has no [prompt].\n")


def test_debug_shows_the_traceback(file):
    arguments = [sys.executable, "-m", "alignkit", "--debug", "train", str(file), "sed=1"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "Did you mean 'seed'?" in done.stderr


def test_other_errors_are_not_hidden(api, file, monkeypatch):
    def fail(**arguments):
        raise KeyError("a bug")

    monkeypatch.setattr(api, "align", fail)
    assert isinstance(call("train", file).exception, KeyError)


# --- the other commands ------------------------------------------------------------------------


def test_sample_prints_text_and_saves_it_where_asked(api, tmp_path):
    asked = []

    def sample(path, prompts, generation, seed):
        asked.append((path, prompts, generation, seed))
        return [f"answer to {prompt}" for prompt in prompts]

    api.sample = sample
    done = call("sample", "runs/x", "a b", "c", "--seed", 3)
    assert done.stdout == "answer to a b\nanswer to c\n"
    out = tmp_path / "out"
    options = ["--generation", "max_new_tokens=5", "--generation", "stop=[END]"]
    assert call("sample", "runs/x", "q", "--out", out, *options).exit_code == 0
    assert (out / "000.txt").read_text() == "answer to q"
    given = GenerationOptions(max_new_tokens=5, stop=("END",))
    assert asked == [("runs/x", ["a b", "c"], None, 3), ("runs/x", ["q"], given, 0)]
    refused = call("sample", "runs/x", "q", "--generation", "max_tokens=5")
    assert refused.exit_code == 2
    assert "generation.max_tokens is not an option" in refused.stderr


def test_sample_saves_images(api, tmp_path, monkeypatch):
    from PIL import Image

    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    api.sample = lambda path, prompts, generation, seed: pictures
    done = call("sample", "my/xl", "red", "blue", "--out", tmp_path / "out")
    paths = done.stdout.split()
    assert paths == [str(tmp_path / "out" / name) for name in ("000.png", "001.png")]
    assert Image.open(paths[1]).getpixel((0, 0)) == (0, 0, 255)
    monkeypatch.chdir(tmp_path)
    call("sample", "my/xl", "red")
    assert (tmp_path / "samples" / "000.png").exists()


def test_evaluate_passes_on_what_it_is_told(monkeypatch, tmp_path):
    from alignkit.options import ImageOptions

    asked = []
    monkeypatch.setattr("alignkit.evaluation.evaluate", lambda *a, **b: asked.append((a, b)) or "x")
    (tmp_path / "model_index.json").write_text("{}")
    given = ["--edit", "0.3,0.9", "--judge", "operator:eq", "--generation", "steps=5"]
    options = ["--data-option", "eval_draws=8", "--data", "d.jsonl", "--num-prompts", 7]
    done = call("evaluate", tmp_path, *given, *options, "--sheet", tmp_path / "sheet")
    assert done.exit_code == 0, done.output
    assert done.stdout.split() == ["x", "Sheet:", str(tmp_path / "sheet" / "index.html")]
    ((model,), told) = asked[0]
    assert model == str(tmp_path) and told["edit"] == (0.3, 0.9) and told["num_prompts"] == 7
    assert told["judge"](1, 1) is True and told["against"] == "auto"
    assert told["generation"] == GenerationOptions(steps=5)
    assert told["data_options"] == ImageOptions(eval_draws=8)
    for wrong, words in (
        (["--edit", "much"], "Strengths are numbers"),
        (["--judge", "operator:equals"], "judge 'operator:equals' must be a function"),
        (["--data-option", "max_length=3"], "data_options.max_length is not an option"),
    ):
        refused = call("evaluate", tmp_path, *wrong)
        assert refused.exit_code == 2 and words in refused.stderr, refused.stderr


def test_demo_and_report_call_their_modules(monkeypatch, tmp_path):
    asked = []
    run = SimpleNamespace(main=lambda **arguments: asked.append(arguments))
    report = SimpleNamespace(rebuild=lambda run_dir: run_dir / "report.html")
    monkeypatch.setitem(sys.modules, "alignkit.demo.run", run)
    monkeypatch.setitem(sys.modules, "alignkit.report", report)
    assert call("demo", "--quick", "--out", tmp_path).exit_code == 0
    assert call("demo").exit_code == 0
    assert asked == [
        {"out": tmp_path, "quick": True},
        {"out": Path("runs/demo"), "quick": False},
    ]
    assert call("report", tmp_path).stdout.strip() == str(tmp_path / "report.html")


def test_methods_and_losses_list_every_row():
    shown = call("methods").stdout
    assert all(name in shown and cls.__name__ in shown for name, cls in METHODS.items())
    lines = call("losses").stdout
    for name, loss in LOSSES.items():
        assert name in lines
        assert loss.equation[:20] in lines
        assert all(beta.source in lines for beta in loss.betas.values())
        for key, default in loss.keywords.items():
            assert f"{key}={default!r}" in lines
    assert "image: beta=5000" in lines


# --- citations ---------------------------------------------------------------------------------


def test_citations_name_the_papers_a_run_rests_on():
    def eprints(*arguments):
        entries = citations(*arguments)
        return [entry.split("eprint = {")[1].split("}")[0] for entry in entries]

    assert eprints("dpo", "sigmoid", "text") == ["2305.18290"]
    assert eprints("dpo", "ipo", "text", "lora") == ["2305.18290", "2310.12036", "2106.09685"]
    assert eprints("dpo", "hinge", "text") == ["2305.18290", "2305.10425", "2309.06657"]
    assert eprints("dpo", "robust", "image") == [
        "2305.18290",
        "2311.12908",
        "2307.01952",
        "2403.00409",
    ]
    assert eprints("dpo", None, "text", "dora") == ["2305.18290", "2106.09685", "2402.09353"]
    with pytest.raises(ConfigError, match="Unknown loss 'sigmod'"):
        citations("dpo", "sigmod", "text")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_method_and_loss_has_its_citation(method, loss):
    """The arXiv numbers of the tables are those of the entries."""
    import re

    entries = "\n".join(citations(method, loss, cited_modalities(method)[-1]))
    named = LOSSES[loss].paper + METHODS[method].paper
    for number in re.findall(r"\d{4}\.\d{5}", named):
        assert f"eprint = {{{number}}}" in entries
    assert entries.count("{") == entries.count("}")


def test_cite_takes_a_method_or_a_file(api, file):
    assert call("cite", "dpo").stdout.count("@") == 3
    file.write_text(file.read_text() + "adapter: {rank: 4, kind: rslora}\n")
    shown = call("cite", file).stdout
    assert [key in shown for key in ("rafailov2023", "hu2022lora", "kalajdzievski2023")] == [
        True
    ] * 3
    assert "wallace2024" not in shown
    assert call("cite", "dpoo").exit_code == 2
