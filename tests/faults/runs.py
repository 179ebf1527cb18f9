"""The small runs that are killed, damaged and starved in these tests, and what they leave."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from alignkit import DPO, PPO, GenerationOptions, ImageOptions, LoRA, TrainerOptions, align
from alignkit.api import build
from alignkit.run import AlignResult, Run
from tests.builders import pair_rows, tiny_lm, tiny_tokenizer

STEPS = 30


def write_text(folder: Path) -> None:
    """A policy and its data, as a user has them."""
    tiny_lm("llama").save_pretrained(folder / "policy")
    tiny_tokenizer().save_pretrained(folder / "policy")
    write_rows(folder / "data.jsonl", pair_rows(16))
    write_rows(folder / "held_out.jsonl", pair_rows(4))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_image(folder: Path) -> None:
    from tests.image.conftest import SIZES, make_pipeline, picture

    make_pipeline().save_pretrained(folder / "policy", safe_serialization=True)
    data = folder / "data"
    data.mkdir()
    lines = []
    for i in range(8):
        line = {"prompt": f"a {'red' if i % 2 else 'blue'} circle"}
        for side, seed in (("chosen", 2 * i), ("rejected", 2 * i + 1)):
            line[side] = f"{side}_{i}.png"
            picture(seed, *SIZES[i]).save(data / line[side])
        lines.append(line)
    write_rows(data / "metadata.jsonl", lines)


WRITERS = {"text": write_text, "image": write_image, "online": write_text}


def short_and_odd(prompts: Any, responses: Any, rows: Any) -> list[float]:
    """A reward that any policy can learn something of."""
    return [(sum(map(ord, text)) % 7) / 7 - 0.1 * len(text) for text in responses]


def options(**changed: Any) -> TrainerOptions:
    """Logging, evaluation, samples and checkpoints at steps that do not divide each other."""
    given: dict[str, Any] = {
        "max_steps": STEPS,
        "batch_size": 3,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "log_every": 4,
        "save_every": 3,
        "sample_every": 11,
    }
    return TrainerOptions(**(given | changed))


def arguments(wing: str, folder: Path, run_dir: Path, **changed: Any) -> dict[str, Any]:
    """Of `align`, for the policy and data that `WRITERS[wing]` put into `folder`."""
    given: dict[str, Any] = {
        "policy": str(folder / "policy"),
        "method": DPO(beta=0.1),
        "data": str(folder / "data.jsonl"),
        "generation": GenerationOptions(max_new_tokens=2),
        "trainer": options(),
        "run_dir": run_dir,
    }
    if wing == "text":
        given["eval_data"] = str(folder / "held_out.jsonl")
        given["trainer"] = options(eval_every=5, keep_best="eval/loss")
    if wing == "image":
        given["method"] = DPO()
        given["data"] = str(folder / "data")
        given["adapter"] = LoRA(rank=4)
        given["generation"] = GenerationOptions(steps=1)
        # Filled at the start of the run, so that kills land there, too.
        given["data_options"] = ImageOptions(cache=f"{run_dir}-cache")
    if wing == "online":
        given["method"] = PPO(
            **{"rollout_size": 6, "kl_coef": 0.1, "truncation": "as_end", "critic": "shared"},
            **{"kl_controller": "adaptive", "kl_target": 0.5, "normalize_scores": True},
        )
        given["generation"] = GenerationOptions(max_new_tokens=4)
        given["reward"] = short_and_odd
        given["eval_data"] = str(folder / "held_out.jsonl")
        given["trainer"] = options(eval_every=5, keep_best="eval/objective/scores")
    return given | changed


def do_run(wing: str, folder: str, run_dir: str, pause: float = 0.0) -> None:
    """The whole run; `pause` seconds of sleep surround everything that makes a write durable."""
    if pause:
        for name in ("fsync", "replace", "truncate"):
            setattr(os, name, _slowed(getattr(os, name), pause))
    align(**arguments(wing, Path(folder), Path(run_dir)))


def _slowed(call: Callable[..., Any], pause: float) -> Callable[..., Any]:
    def slowed(*args: Any, **kwargs: Any) -> Any:
        time.sleep(pause)
        result = call(*args, **kwargs)
        time.sleep(pause)
        return result

    return slowed


def abandon(after: int, **given: Any) -> Run:
    """Take `after` steps and leave the folder as a kill at that moment does."""
    run = build(given.pop("policy"), given.pop("method"), given.pop("data"), **given)
    if after:
        for record in run.steps():
            if record.step == after:
                break
    assert run.folder is not None
    run.folder.unlock()
    return run


def resumed(**given: Any) -> AlignResult:
    return align(given.pop("policy"), given.pop("method"), given.pop("data"), **given)


def assert_same_folder(mine: Path, other: Path) -> None:
    """Bit by bit the same results, apart from times; and nothing else lies about."""
    assert lines_of(mine) == lines_of(other)
    names = {str(path.relative_to(mine)) for path in mine.rglob("*")}
    assert names == {str(path.relative_to(other)) for path in other.rglob("*")}
    assert not [name for name in names if ".alignkit" in name]
    for name in sorted(names):
        if name.endswith((".safetensors", ".png", ".jsonl")) and name.startswith(
            ("model", "samples", "checkpoints")
        ):
            assert _content(mine / name) == _content(other / name), name


def _content(path: Path) -> Any:
    """The bytes of a file; of safetensors without the order of its notes, which is random."""
    raw = path.read_bytes()
    if path.suffix != ".safetensors":
        return raw
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def lines_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times and memory; every line must be whole."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == list(range(1, len(steps) + 1))
    untimed = ("seconds", "memory")
    return [{k: v for k, v in line.items() if not k.startswith(untimed)} for line in lines]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def weights_bytes(run: Path) -> dict[str, bytes]:
    files = sorted((run / "model").rglob("*.safetensors"))
    assert files
    return {file.name: file.read_bytes() for file in files}


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)
