"""The command line that the scripts share, and what both sides are told of a question."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from bench_text import duel, figures, meter, world
from bench_text.duel import Contestant
from bench_text.figures import Bar

SCRIPTS = Path(__file__).parents[1]
HOW_TO_MAKE = """\
The peer needs a Python of its own that has TRL, with the torch and transformers of this one:

    uv venv /tmp/trl
    uv pip install --python /tmp/trl/bin/python trl==1.16.0 peft {torch} {transformers}

Then give --peer-python /tmp/trl/bin/python. --no-peer runs our side alone."""


def read(
    documentation: str,
    arguments: Sequence[str] | None,
    more: Callable[[argparse.ArgumentParser], None] | None = None,
    *,
    peer: Literal["needed", "optional", "none"] = "needed",
    small: bool = False,
) -> argparse.Namespace:
    """The options that all scripts have; `world` is made and `folder` is where it is.

    `small`: the question does not depend on sizes, and the tiny model answers it, too.
    """
    parser = argparse.ArgumentParser(description=documentation.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6, help="timed steps of each")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few steps")
    parser.add_argument("--work", type=Path, default=SCRIPTS.parent / "runs" / "bench")
    parser.add_argument("--name", help="of the JSON file; the script's own when left out")
    if peer != "none":
        parser.add_argument("--peer-python", metavar="PATH", help="a Python that has TRL 1.16")
        parser.add_argument("--no-peer", action="store_true", help="our side alone")
    if more is not None:
        more(parser)
    options = parser.parse_args(arguments)
    if peer == "none" or (peer == "optional" and options.peer_python is None):
        options.no_peer = True
    if not options.no_peer and options.peer_python is None:
        pins = {name: f"{name}=={v}" for name, v in meter.versions("torch", "transformers").items()}
        parser.exit(2, HOW_TO_MAKE.format(**pins) + "\n")
    options.rounds = 2 if options.quick else options.rounds
    options.world = world.QUICK if options.quick or small else world.FULL
    options.work.mkdir(parents=True, exist_ok=True)
    options.folder = world.make(options.work, options.world)
    return options


def first_rows(folder: Path, name: str, num: int) -> Path:
    """The first `num` rows of a file of the world, as a file."""
    lines = (folder / f"{name}.jsonl").read_text().splitlines(keepends=True)
    assert num <= len(lines), f"{name} has {len(lines)} rows, {num} are needed: fewer rounds"
    path = folder / f"{name}-{num}.jsonl"
    path.write_text("".join(lines[:num]))
    return path


def specification(
    options: argparse.Namespace, rows: str, batch: int, **more: Any
) -> dict[str, Any]:
    """What both sides are told of a training question; the first of the steps is a warm-up."""
    steps = options.rounds + 1
    common = {
        "model": str(options.folder / "model"),
        "rows": str(first_rows(options.folder, rows, steps * batch)),
        "scratch": str(options.work / "scratch"),
        "steps": steps,
        "batch": batch,
        "rate": 1e-6,
        "max_length": options.world.cap,
        "checkpointing": False,
        "cached": False,
        "lora": 0,
        "packed": False,
        "packing": "auto",
        "head": "completions",
        "micro": 0,
        "reads": False,
        "compile": False,
    }
    return common | more


def answer(
    question: str,
    contestants: Sequence[Contestant],
    options: argparse.Namespace,
    *,
    bar: float,
    memory: float | None,
    same_losses: bool = True,
) -> int:
    """The whole of a script with one peer and one bar: compete, compare, report."""
    peers = [who.name for who in contestants if who.side == "peer" and not options.no_peer]
    taking_part = [who for who in contestants if who.side == "ours" or who.name in peers]
    told = duel.compete(taking_part, options.rounds + 1, options)
    bars: list[Bar] = []
    for name in peers:
        mine, theirs = told[taking_part[0].name], told[name]
        limit = None if options.quick else bar
        bars.append(
            figures.shown(
                "times as fast", figures.ratio(theirs.timed("cpu"), mine.timed("cpu")), limit
            )
        )
        bars += figures.beside(mine, theirs, memory=memory, same_losses=same_losses)
    return figures.report(question, told, bars, options)
