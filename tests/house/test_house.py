"""Rules that a linter does not know: sizes, names, and what the lowest floors import."""

from __future__ import annotations

import ast
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in ("alignkit", "alignkit_diffusion")
    for path in (ROOT / package).rglob("*.py")
)
MAX_FILE, MAX_FUNCTION = 300, 60

LONG_FILES: dict[str, int] = {}
"""File -> lines it may have. Entries shrink and go; none is added and none grows."""

LONG_FUNCTIONS: dict[str, int] = {}
"""file:function -> lines it may have, in the same way."""


def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def functions() -> dict[str, int]:
    """file:function -> lines from `def` to the end, the docstring left out."""
    found = {}
    for file in FILES:
        for node in ast.walk(tree(file)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[0]
                text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
                docstring = (first.end_lineno or 0) - first.lineno + 1 if text else 0
                length = (node.end_lineno or 0) - node.lineno + 1 - docstring
                found[f"{file}:{node.name}"] = max(length, found.get(f"{file}:{node.name}", 0))
    return found


def excess(lengths: dict[str, int], limit: int, exceptions: dict[str, int]) -> dict[str, int]:
    return {name: n for name, n in lengths.items() if n > exceptions.get(name, limit)}


def stale(lengths: dict[str, int], limit: int, exceptions: dict[str, int]) -> dict[str, int]:
    """Exceptions that are no longer needed, or not as large."""
    return {
        name: allowed
        for name, allowed in exceptions.items()
        if lengths.get(name, 0) <= limit or lengths[name] < allowed
    }


def test_files_are_short() -> None:
    lengths = {file: len((ROOT / file).read_text().splitlines()) for file in FILES}
    assert len(lengths) > 50
    assert not excess(lengths, MAX_FILE, LONG_FILES)
    assert not stale(lengths, MAX_FILE, LONG_FILES), "shrink the list of exceptions"


def test_functions_are_short() -> None:
    lengths = functions()
    assert len(lengths) > 300
    assert not excess(lengths, MAX_FUNCTION, LONG_FUNCTIONS)
    assert not stale(lengths, MAX_FUNCTION, LONG_FUNCTIONS), "shrink the list of exceptions"


@pytest.mark.parametrize(
    "word", ["beta", "reference", "reward", "chosen", "token", "latent", "prompt"]
)
def test_the_trainer_knows_no_modality_and_no_algorithm(word) -> None:
    text = (ROOT / "alignkit/trainer.py").read_text().lower()
    assert not re.findall(rf".*{word}.*", text)


@pytest.mark.parametrize("file", [f for f in FILES if not f.startswith("alignkit/losses/")])
def test_no_code_asks_for_a_loss_by_its_name(file) -> None:
    """What a loss can do stands in its row; a branch on its name would be a second table."""
    from alignkit.losses import LOSSES as TABLE

    for node in ast.walk(tree(file)):
        if isinstance(node, (ast.Compare, ast.MatchValue)):
            named = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            assert not {n for n in named if isinstance(n, str)} & set(TABLE), (file, node.lineno)


LOSSES = [file for file in FILES if file.startswith("alignkit/losses/")]
BELOW_LOSSES = ("errors", "batches", "options", "draws", "protocols", "methods", "losses")


@pytest.mark.parametrize("file", LOSSES)
def test_losses_are_mathematics(file) -> None:
    allowed = {"torch", "jaxtyping", *sys.stdlib_module_names}
    for node in ast.walk(tree(file)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module or ""]
        for name in names:
            top, *rest = name.split(".")
            below = top == "alignkit" and rest and rest[0] in BELOW_LOSSES
            assert top in allowed or below, f"{file} imports {name}"


def public_modules() -> list[str]:
    named = []
    for file in FILES:
        targets = [
            t for node in tree(file).body if isinstance(node, ast.Assign) for t in node.targets
        ]
        if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
            named.append(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    return named


@pytest.mark.parametrize("name", public_modules())
def test_every_public_name_exists_once(name) -> None:
    module = import_module(name)
    for public in module.__all__:
        assert getattr(module, public, None) is not None, f"{name}.{public}"
    assert len(set(module.__all__)) == len(module.__all__)


@pytest.mark.parametrize("file", [f for f in FILES if not f.endswith("__main__.py")])
def test_every_file_says_what_it_is_for(file) -> None:
    assert ast.get_docstring(tree(file))
