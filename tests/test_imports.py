"""`import alignkit` and `alignkit --help` answer at once: nothing heavy is loaded."""

import json
import statistics
import subprocess
import sys
import time

import pytest

import alignkit

HEAVY = ("torch", "transformers", "diffusers", "peft", "datasets", "accelerate", "matplotlib")
LIGHT_USES = {
    "the package": "import alignkit",
    "its light names": (
        "import alignkit; alignkit.DPO(), alignkit.LoRA(), alignkit.TrainerOptions(), "
        "alignkit.methods(), alignkit.ConfigError, alignkit.citations, dir(alignkit)"
    ),
    "the configuration": (
        "from alignkit.config import from_mapping, to_mapping; "
        "to_mapping(from_mapping({'policy': 'p', 'method': 'dpo', 'data': 'd'}))"
    ),
    "the command line": "import alignkit.cli",
}


@pytest.mark.parametrize("use", LIGHT_USES)
def test_light_uses_load_nothing_heavy(use):
    code = f"{LIGHT_USES[use]}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "alignkit" in loaded
    assert loaded.isdisjoint(HEAVY), sorted(loaded.intersection(HEAVY))


@pytest.mark.parametrize("arguments", [["-c", "import alignkit"], ["-m", "alignkit", "--help"]])
def test_answers_within_a_second(arguments):
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 1, seconds


def test_help_does_not_load_torch():
    code = (
        "import sys, alignkit.cli as cli\n"
        "try: cli.app(['train', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_every_public_name_is_there():
    for name in alignkit.__all__:
        assert getattr(alignkit, name) is not None
    assert set(alignkit.__all__) <= set(dir(alignkit))
    with pytest.raises(AttributeError, match="has no attribute 'aling'"):
        alignkit.aling  # noqa: B018


def test_methods_is_the_function_also_after_the_module_of_that_name_was_imported():
    import importlib

    importlib.import_module("alignkit.methods")
    assert [row["name"] for row in alignkit.methods()][:3] == ["dpo", "kto", "sft"]
