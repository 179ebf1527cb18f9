"""One process of a world: does the tasks of a JSON file in order, and notes what went wrong.

    accelerate launch --num_processes 2 ... -m tests.distributed.world TASKS.json

A task is `{"do": name of a function below, ...}` with that function's arguments.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from tests.distributed.cases import play


def train(folder: str, case: str, **arguments: Any) -> None:
    run_dir = arguments.pop("run_dir", None)
    play(case, Path(folder), run_dir=None if run_dir is None else Path(run_dir), **arguments)


def copy(folder: str, to: str) -> None:
    """Keep a folder as it is now; the main process does it while the other waits."""
    from alignkit.runtime import Runtime

    runtime = Runtime()
    if runtime.is_main:
        shutil.copytree(folder, to)
    runtime.barrier()


def answer(folder: str) -> None:
    """Sample from sharded weights, each process to prompts of its own, of which one has more."""
    from alignkit import DPO
    from alignkit.api import build
    from alignkit.text import generation
    from tests.builders import pair_rows, tiny_lm, tiny_tokenizer
    from tests.distributed.cases import SAMPLED, questions, trainer

    options = trainer(sharding="fsdp2")
    run = build((tiny_lm("llama"), tiny_tokenizer()), DPO(), pair_rows(4), trainer=options)
    asked = questions()
    own = range(6) if run.runtime.rank == 0 else range(6, len(asked))
    generation.TOKENS_PER_BATCH = 80  # several batches on one process, one on the other
    with torch.no_grad():
        found = run.wing.generate_tokens(
            [asked[place] for place in own],
            SAMPLED,
            keys=[(3, 1, place) for place in own],
            together=run.runtime,
        )
    told = {str(place): [one.ids, one.ended] for place, one in zip(own, found, strict=True)}
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"answers-{run.runtime.rank}.json").write_text(json.dumps(told))
    run.runtime.barrier()


def collectives(folder: str) -> None:
    """What `Runtime` does with values that differ from process to process."""
    from alignkit.runtime import Runtime

    runtime = Runtime()
    rank = runtime.rank
    mine = torch.full((2, 2), rank + 1.0)
    told = {
        "sum": runtime.sum(mine).tolist(),
        "input": mine.tolist(),
        "sum of integers": runtime.sum(torch.tensor([rank, 1])).tolist(),
        "gather": runtime.gather(torch.arange(3 * rank + 1) + 10 * rank).tolist(),
        "gather rows": runtime.gather(torch.full((1 + rank, 2), float(rank))).tolist(),
        "gather nothing": runtime.gather(torch.arange(rank)).tolist(),
        "gather empty": runtime.gather(torch.zeros(0)).tolist(),
        "max": [runtime.max(rank * 7), runtime.max(-rank), runtime.max(2**40 + rank)],
        "share": runtime.share({"from": rank, "list": [rank, None]}),
        "main": runtime.is_main,
        "size": runtime.size,
    }
    runtime.barrier()
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"rank{rank}.json").write_text(json.dumps(told))


def not_finite(folder: str, poisoned: int) -> None:
    """A run whose row `poisoned` has a loss of NaN; what is raised on each process."""
    from alignkit import DPO, align
    from alignkit.errors import NonFiniteError
    from tests.builders import pair_rows, tiny_lm, tiny_tokenizer
    from tests.distributed.cases import trainer

    rows = pair_rows(8)
    tokenizer, model = tiny_tokenizer(), tiny_lm("llama")
    rows[poisoned]["chosen"][0]["content"] += " ~"
    (token,) = tokenizer("~", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    message = ""
    try:
        align((model, tokenizer), DPO(), rows, trainer=trainer(batch_size=8))
    except NonFiniteError as error:
        message = str(error)
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(message))


class TwoTables(torch.nn.Module):
    """Of which a forward reads one."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = torch.nn.ModuleList(torch.nn.Linear(3, 1, bias=False) for _ in range(2))

    def shard_units(self) -> list[torch.nn.Module]:
        return list(self.tables)

    def forward(self, which: int) -> torch.Tensor:
        return self.tables[which](torch.ones(3)).sum()


def unreached(folder: str) -> None:
    """ZeRO-3: a table's gradient in a step that reads it, and in the next, which does not."""
    from alignkit.runtime import Runtime
    from alignkit.zero import gradient_of

    runtime = Runtime(sharding="zero3")
    given = {"policy": TwoTables()}
    modules, optimizer = runtime.engage(given, lambda found: torch.optim.AdamW(found, fused=True))
    first, seen = given["policy"].tables[0].weight, []
    for which in (0, 1):
        with runtime.last_backward(modules.values(), last=True):
            runtime.backward(modules["policy"](which))
        runtime.clip(list(given["policy"].parameters()), 1.0)
        seen.append(float(gradient_of(first).norm()))
        optimizer.step()
        optimizer.zero_grad()
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"rank{runtime.rank}.txt").write_text(" ".join(map(str, seen)))


def main() -> None:
    torch.set_num_threads(1)
    for task in json.loads(Path(sys.argv[1]).read_text()):
        name = task.pop("do")
        try:
            globals()[name](**task)
        except BaseException:
            out = Path(task["folder"])
            out.mkdir(parents=True, exist_ok=True)
            (out / f"failed{os.environ['RANK']}.txt").write_text(traceback.format_exc())
            raise


if __name__ == "__main__":
    main()
