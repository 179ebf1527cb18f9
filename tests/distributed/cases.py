"""Runs that are played once by one process and once by two, and what they leave to compare.

`play` is called by every process of a world (see `world.py`) and by the test itself, alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from alignkit import (
    DPO,
    KTO,
    PPO,
    SFT,
    CachedReference,
    EMAReference,
    GenerationOptions,
    LoRA,
    TextOptions,
    TrainerOptions,
    zero,
)
from alignkit.api import build
from alignkit.placed import is_zero, local, size_of
from alignkit.run import Run
from tests.builders import pair_rows, tiny_lm, tiny_tokenizer

WEIGHTS = (1.0, 0.0, 2.0, 0.5)

SAMPLED = GenerationOptions(max_new_tokens=14)


def questions() -> list[Any]:
    """Token ids of ragged prompts."""
    draw = np.random.default_rng(5)
    return [draw.integers(4, 300, size).astype(np.int32) for size in (3, 12, 7, 20, 5, 9, 4, 15)]


def weighted_rows(num: int) -> list[dict[str, Any]]:
    """Pairs of uneven lengths; every fourth one has weight 0 and must not count."""
    return [row | {"weight": WEIGHTS[i % 4]} for i, row in enumerate(pair_rows(num))]


def trainer(**changed: Any) -> TrainerOptions:
    """16 rows in batches of 5: two processes get 2 and 3 of them, and the last batch is one row."""
    options: dict[str, Any] = {
        "batch_size": 5,
        "micro_batch": 1,
        "learning_rate": 1e-3,
        "warmup": 0,
        "precision": "fp32",
        "log_every": 1,
    }
    return TrainerOptions(**(options | changed))


@dataclass(frozen=True)
class Case:
    """The arguments of one run; objects in memory are made afresh by every process."""

    policy: Callable[[], Any]
    arguments: Callable[[], dict[str, Any]]
    method: Any = field(default_factory=lambda: DPO(beta=0.1))
    logits: int | None = None
    """What the head makes at a time."""


def _text(architecture: str) -> Callable[[], Any]:
    return lambda: (tiny_lm(architecture), tiny_tokenizer())


def _continued() -> Any:
    """A model that carries an adapter which has been trained already."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(tiny_lm("llama"), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return model, tiny_tokenizer()


def _plain(**changed: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"data": pair_rows(16), "trainer": trainer(**changed)}


def _moving(**changed: Any) -> Callable[[], dict[str, Any]]:
    """With a reference that has a state to save."""
    return lambda: _plain(**changed)() | {"reference": EMAReference(0.5)}


def _evaluated() -> dict[str, Any]:
    return {
        "data": weighted_rows(16),
        "eval_data": weighted_rows(7),
        "trainer": trainer(eval_every=2, log_every=3),
    }


def _lora(**changed: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "data": pair_rows(16),
        "adapter": LoRA(rank=4),
        "trainer": trainer(micro_batch=2, **changed),
    }


def _averaged() -> dict[str, Any]:
    """Clipped, and evaluated, sampled and saved with the average of its weights."""
    shaped = trainer(sharding="fsdp2", ema=0.5, max_grad_norm=0.1, eval_every=2)
    return {"data": pair_rows(16), "eval_data": pair_rows(7), "trainer": shaped}


def _image() -> Any:
    from tests.image.conftest import make_pipeline

    return make_pipeline()


def _pictures(**changed: Any) -> Callable[[], dict[str, Any]]:
    def arguments() -> dict[str, Any]:
        from tests.image.conftest import SIZES, picture

        rows = [
            {
                "prompt": f"a red circle on the {'big ' * (i % 3)}house",
                "chosen": picture(2 * i, *SIZES[i % 8]),
                "rejected": picture(2 * i + 1, *SIZES[-1 - i % 8]),
            }
            for i in range(11)
        ]
        return {"data": rows, "trainer": trainer(learning_rate=1e-3), **changed}

    return arguments


SORTED = DPO(loss={"aot": 1.0, "beta_dpo": 0.5}, beta=0.1)
"""Margins that meet by rank over the whole batch, and a state that moves with its mean."""


def _demonstrations(**changed: Any) -> Callable[[], dict[str, Any]]:
    """Conversations of two turns, of which the assistant's are learned."""

    def arguments() -> dict[str, Any]:
        more = [{"role": "user", "content": "And then?"}]
        rows = [
            {
                "messages": [*row["prompt"], *row["chosen"], *more, *row["rejected"]],
                "weight": row["weight"],
            }
            for row in weighted_rows(16)
        ]
        return {"data": rows, "trainer": trainer(**changed)}

    return arguments


def _supervised() -> dict[str, Any]:
    given = _demonstrations(eval_every=2, log_every=3)()
    return given | {"eval_data": given["data"][:7]}


def _singles() -> dict[str, Any]:
    rows = [
        {
            "prompt": row["prompt"],
            "completion": row["chosen" if i % 3 else "rejected"],
            "label": i % 3 > 0,
            "weight": row["weight"],
        }
        for i, row in enumerate(weighted_rows(16))
    ]
    return {"data": rows, "eval_data": rows[:7], "trainer": trainer(eval_every=2, log_every=3)}


def _streamed() -> dict[str, Any]:
    """More than an epoch, shuffled within a buffer; the reference's numbers are made ahead."""
    return {
        "data": weighted_rows(16),
        "data_options": TextOptions(streaming=True, shuffle_buffer=6),
        "trainer": trainer(max_steps=5),
    }


def _cached(made: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """With the reference's numbers on disk, in a folder of the run's own."""
    return lambda: made() | {"reference": CachedReference()}


TURNS = SFT(loss_on="assistant", neftune_alpha=5.0)


def _vowels(prompts: Any, responses: Any, rows: Any) -> list[float | None]:
    """A reward, of which one answer in a few is missing."""
    counts = [sum(text.count(vowel) for vowel in "aeiou") for text in responses]
    return [None if len(t) % 5 == 4 else float(n) for t, n in zip(responses, counts, strict=True)]


def _online(**changed: Any) -> Callable[[], dict[str, Any]]:
    """Rollouts of 8 answers in minibatches of 4, scored, and evaluated on held-out prompts."""

    def arguments() -> dict[str, Any]:
        shaped = {"batch_size": 4, "max_steps": 5, "micro_batch": 1, "eval_every": 4}
        return {
            "data": [{"prompt": row["prompt"]} for row in pair_rows(16)],
            "eval_data": [{"prompt": row["prompt"]} for row in pair_rows(3)],
            "reward": _vowels,
            "generation": GenerationOptions(max_new_tokens=6, temperature=0.8),
            "trainer": trainer(**(shaped | changed)),
        }

    return arguments


CASES: Mapping[str, Case] = {
    "online": Case(
        _text("llama"), _online(), PPO(rollout_size=8, normalize_scores=True, truncation="as_end")
    ),
    "sharded_online": Case(
        _text("llama"), _online(sharding="fsdp2"), PPO(rollout_size=8, truncation="as_end")
    ),
    "supervised": Case(_text("llama"), _supervised, TURNS),
    "sharded_supervised": Case(_text("llama"), _demonstrations(sharding="fsdp2"), TURNS),
    "coupled": Case(_text("llama"), _evaluated, SORTED),
    "singles": Case(_text("llama"), _singles, KTO(beta=0.1, undesirable_weight=1.5)),
    "sharded_coupled": Case(_text("llama"), _plain(sharding="fsdp2"), SORTED),
    "full": Case(_text("llama"), _evaluated),
    "tied": Case(_text("qwen2"), _plain(micro_batch="auto")),
    "lora": Case(_text("qwen2"), _lora()),
    "cached": Case(_text("llama"), _cached(_singles), KTO(beta=0.1)),
    "streamed": Case(_text("llama"), _cached(_streamed)),
    "sharded_cached": Case(_text("llama"), _cached(_plain(sharding="fsdp2", micro_batch="auto"))),
    "interrupted": Case(_text("llama"), _moving(save_every=2, log_every=4)),
    "sharded_full": Case(_text("llama"), _plain(sharding="fsdp2")),
    "sharded_tied": Case(_text("qwen2"), _plain(sharding="fsdp2", micro_batch="auto")),
    "sharded_lora": Case(_text("llama"), _lora(sharding="fsdp2")),
    "sharded_continued": Case(_continued, _plain(sharding="fsdp2")),
    "sharded_interrupted": Case(_text("llama"), _moving(sharding="fsdp2", save_every=2)),
    "sharded_chunked": Case(_text("qwen2"), _plain(sharding="fsdp2"), logits=4000),
    "sharded_checkpointed": Case(
        _text("llama"), _plain(sharding="fsdp2", gradient_checkpointing=True)
    ),
    "sharded_averaged": Case(_text("llama"), _averaged),
    "sharded_half": Case(_text("llama"), _plain(sharding="fsdp2", precision="bf16")),
    "sharded_half_lora": Case(_text("llama"), _lora(sharding="fsdp2", precision="bf16")),
    "image_full": Case(_image, _pictures(), DPO(beta=30.0)),
    "image_lora": Case(_image, _pictures(adapter=LoRA(rank=4)), DPO(beta=30.0)),
}
"""Played without sharding where one process is alone."""


@dataclass(frozen=True)
class Played:
    """What one process saw of a run."""

    history: list[dict[str, float]]
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    local: dict[str, Any]

    @classmethod
    def read(cls, folder: Path, rank: int = 0) -> Played:
        told = json.loads((folder / f"rank{rank}.json").read_text())
        tensors = load_file(folder / f"rank{rank}.safetensors")
        return cls(told["history"], below(tensors, "weights"), below(tensors, "gradients"), told)


def below(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors named `kind|...`, without that prefix."""
    return {k.partition("|")[2]: v for k, v in tensors.items() if k.startswith(kind + "|")}


def play(
    name: str,
    folder: Path,
    *,
    stop_after: int | None = None,
    resume: str = "auto",
    run_dir: Path | None = None,
    alone: bool = False,
    sharding: str | None = None,
) -> None:
    """Train the case and write what this process saw below `folder`.

    Args:
        name: of `CASES`.
        folder: gets `rank*.json`, `rank*.safetensors` and the run folder `run`.
        stop_after: leave the loop after this step, as a killed run does.
        resume: as `align` takes it.
        run_dir: instead of `folder / "run"`.
        alone: one process, which does not shard.
        sharding: instead of the case's.
    """
    if alone:
        sharding = "none"
    with ExitStack() as stack:
        if (logits := CASES[name].logits) is not None:
            chunks = {"LOGITS": 0, "CHUNK": {"cpu": logits}}
            stack.enter_context(patch.multiple("alignkit.text.head", **chunks))
        _play(name, folder, stop_after, resume, run_dir, sharding)


def _play(
    name: str,
    folder: Path,
    stop_after: int | None,
    resume: str,
    run_dir: Path | None,
    sharding: str | None,
) -> None:
    case, image = CASES[name], name.startswith("image")
    arguments = case.arguments()
    if sharding is not None:
        arguments["trainer"] = replace(arguments["trainer"], sharding=sharding)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(arguments.get("reference"), CachedReference):
        arguments["reference"] = CachedReference(folder=folder / "numbers")
    short = GenerationOptions(steps=1) if image else GenerationOptions(max_new_tokens=2)
    run = build(
        case.policy(),
        case.method,
        arguments.pop("data"),
        run_dir=run_dir or folder / "run",
        resume=resume,
        **({"generation": short} | arguments),
    )
    gradients = _watch_gradients(run)
    for record in run.steps():
        if record.step == stop_after:
            break
    else:
        run.finish()
    if run.folder is not None:
        run.folder.unlock()
    _write(run, gradients, folder)


def _watch_gradients(run: Run) -> dict[str, Tensor]:
    """Every step's gradient before clipping, filled in as the run goes on."""
    seen: dict[str, Tensor] = {}
    clip, names = run.runtime.clip, list(run.trainer.parameters)

    def watching(parameters: Any, max_norm: float) -> Tensor:
        for name, parameter in zip(names, parameters, strict=True):
            if (gradient := _gradient(parameter)) is not None:
                seen[f"{run.trainer.step + 1}|{name}"] = gradient.clone()
        return clip(parameters, max_norm)

    run.runtime.clip = watching  # type: ignore[method-assign]
    return seen


def _gradient(parameter: Any) -> Tensor | None:
    if is_zero(parameter):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)
    gradient = parameter.grad
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _write(run: Run, gradients: Mapping[str, Tensor], folder: Path) -> None:
    parameters = run.trainer.parameters
    weights = {
        name: zero.gathered(p) if is_zero(p) else whole(p.detach())
        for name, p in parameters.items()
    }
    objective: Any = run.trainer.objective
    reference = getattr(getattr(objective, "reference", None), "module", None)
    told = {
        "history": run.history,
        "metrics": run.metrics,
        "size": run.runtime.size,
        "policy": _placement(objective.backend.module),
        "reference": None if reference is None else _placement(reference),
    }
    rank = run.runtime.rank
    (folder / f"rank{rank}.json").write_text(json.dumps(told))
    tensors = {f"weights|{k}": v for k, v in weights.items()}
    tensors |= {f"gradients|{k}": v for k, v in gradients.items()}
    save_file(
        {k: v.contiguous().clone() for k, v in tensors.items()},
        folder / f"rank{rank}.safetensors",
    )


def _placement(module: nn.Module) -> dict[str, tuple[bool, int, int]]:
    """Name -> (sharded, elements, elements held here) of every parameter."""
    found = {}
    for name, p in module.named_parameters():
        sharded = isinstance(p, DTensor) or is_zero(p)
        found[name] = (sharded, size_of(p), local(p).numel())
    return found
