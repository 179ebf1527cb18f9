"""alignkit's contestants, through its public interface."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench_text.meter import Meter, versions


def dpo(spec: dict[str, Any], meter: Meter) -> None:
    from alignkit import DPO

    _train(spec, meter, DPO(beta=0.1))


def kto(spec: dict[str, Any], meter: Meter) -> None:
    from alignkit import KTO

    _train(spec, meter, KTO(beta=0.1))


def sft(spec: dict[str, Any], meter: Meter) -> None:
    from alignkit import SFT

    _train(spec, meter, SFT())


def reward(spec: dict[str, Any], meter: Meter) -> None:
    from alignkit import RewardModel

    _train(spec, meter, RewardModel())


def bound(spec: dict[str, Any], meter: Meter) -> None:
    """Every batch twice: timed, and then noted; afterwards its products alone."""
    from alignkit import DPO
    from alignkit.text.handed import uncompiled
    from bench_text import matmuls

    run = _built(spec, meter, DPO(beta=0.1))
    models = [run.wing.policy, run.trainer.objective.reference.module]
    meter.started()
    steps = run.steps()
    for _ in range(spec["steps"] // 2):
        started = meter.clock()
        loss = next(steps).loss
        cpu = meter.clock() - started
        with ExitStack() as stack:
            # Compiled blocks would not show their products.
            for model in models:
                stack.enter_context(uncompiled(model))
            noted = stack.enter_context(matmuls.Matmuls())
            next(steps)
        alone = matmuls.replay(noted.found)
        meter.lap(cpu=cpu, loss=loss, flops=matmuls.flops(noted.found), matmuls=alone)
    list(steps)


def growth(spec: dict[str, Any], meter: Meter) -> None:
    """One timed step of each size, in pairs of rows, after one that warms up."""
    from alignkit import DPO

    for place, size in enumerate(spec["sizes"]):
        told = spec | {"steps": 2, "batch": spec["batch"] * size}
        run = _built(told, meter, DPO(beta=0.1))
        if place == 0:
            meter.started()
        steps = run.steps()
        next(steps)
        started = meter.clock()
        loss = next(steps).loss
        meter.lap(cpu=meter.clock() - started, loss=loss)
        list(steps)


def reference(spec: dict[str, Any], meter: Meter) -> None:
    """Every round fills a cache with rows of its own, and then looks for all of them once more."""
    import json
    import shutil

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from alignkit import DPO, CachedReference, TextOptions, build, cache_reference

    get_ready(meter)
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype="float32")
    policy = model, AutoTokenizer.from_pretrained(spec["model"])
    lines = Path(spec["rows"]).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    folder = Path(spec["scratch"]) / "reference"
    shutil.rmtree(folder, ignore_errors=True)
    options = TextOptions(max_length=spec["max_length"])
    given = {"reference": CachedReference(folder=folder), "data_options": options}
    with _forwards() as trial:  # of any run at its start, also of one without a reference
        build(policy, DPO(loss="simpo"), rows, data_options=options).abandon()
    meter.started()
    for start in range(0, len(rows), spec["batch"]):
        some = rows[start : start + spec["batch"]]
        with _forwards() as first:
            started = meter.clock()
            cache_reference(policy, DPO(beta=0.1), some, **given)
            cpu = meter.clock() - started
        with _forwards() as again:
            found = cache_reference(policy, DPO(beta=0.5), some, **given)
        assert len(first) > len(trial), "a pass without a forward proves nothing"
        meter.lap(cpu=cpu, again=len(again) - len(trial), computed=found.computed)


@contextmanager
def _forwards() -> Iterator[list[str]]:
    """What is evaluated of likelihoods inside, one entry per forward."""
    from alignkit.text.likelihood import TextLikelihood

    forward, seen = TextLikelihood.forward, []

    def counted(module: Any, *given: Any, **named: Any) -> Any:
        seen.append("forward")
        return forward(module, *given, **named)

    TextLikelihood.forward = counted
    try:
        yield seen
    finally:
        TextLikelihood.forward = forward


def tokenise(spec: dict[str, Any], meter: Meter) -> None:
    from transformers import AutoTokenizer

    from alignkit import TextOptions
    from alignkit.rows import read_rows
    from alignkit.text.data import read_examples

    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    rows = read_rows(spec["rows"], columns={})
    options = TextOptions(max_length=spec["max_length"])
    meter.started()
    for _ in range(spec["steps"]):
        read_examples(rows, tokenizer, options, "pairs")
        meter.lap()


def _train(spec: dict[str, Any], meter: Meter, method: Any) -> None:
    run = _built(spec, meter, method)
    meter.count(run.wing.policy)
    if spec["reads"]:
        meter.watch(run.wing.policy)
    meter.started(versions=versions("torch", "transformers"))
    for record in run.steps():
        meter.lap(loss=record.loss)


def _built(spec: dict[str, Any], meter: Meter, method: Any) -> Any:
    from alignkit import LoRA, TextOptions, TrainerOptions, build, precompute_reference
    from alignkit.reference_options import PrecomputedReference

    get_ready(meter)
    trainer = TrainerOptions(
        max_steps=spec["steps"],
        batch_size=spec["batch"],
        micro_batch=spec["micro"] or "auto",
        learning_rate=spec["rate"],
        schedule="constant",
        warmup=0,
        shuffle=False,
        gradient_checkpointing=spec["checkpointing"],
        compile=spec["compile"],
    )
    options = TextOptions(max_length=spec["max_length"], packing=spec["packing"])
    given: dict[str, Any] = {"data_options": options, "trainer": trainer}
    if spec["lora"]:
        given["adapter"] = LoRA(rank=spec["lora"])
    if spec["cached"]:
        table = precompute_reference(spec["model"], spec["rows"], data_options=options)
        given["reference"] = PrecomputedReference(table)
    return build(spec["model"], method, spec["rows"], **given)


def get_ready(meter: Meter) -> None:
    """What a run imports sooner or later is no memory of the run."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import alignkit.text.wing  # noqa: F401

    meter.imported()


def ppo(spec: dict[str, Any], meter: Meter) -> None:
    """A lap is a rollout with all of its updates; `update` is the latter's share."""
    import json

    from alignkit import PPO, GenerationOptions, LoRA, TextOptions, TrainerOptions, build
    from bench_text.scorer import Scorer

    get_ready(meter)
    rows = [json.loads(line) for line in Path(spec["rows"]).read_text().splitlines()]
    shared = spec["shared"]
    run: Any = build(
        spec["model"],
        PPO(
            inner_epochs=spec["epochs"],
            truncation="as_end",
            critic="shared" if shared else "separate",
        ),
        [{"prompt": row["prompt"]} for row in rows],
        reward=Scorer(spec["model"]),
        adapter=LoRA(rank=16) if shared else None,
        generation=GenerationOptions(max_new_tokens=spec["tokens"]),
        data_options=TextOptions(max_length=spec["max_length"]),
        trainer=TrainerOptions(
            max_steps=spec["steps"] * spec["epochs"],
            batch_size=spec["batch"],
            learning_rate=spec["rate"],
            schedule="constant",
            warmup=0,
            shuffle=False,
        ),
    )
    source = run.trainer.source
    rollout, sampled = source._rollout, [0.0]

    def timed(prompts: Any) -> Any:
        started = meter.clock()
        found = rollout(prompts)
        sampled[0] = meter.clock() - started
        return found

    source._rollout = timed
    meter.started(versions=versions("torch", "transformers"))
    started = meter.clock()
    for record in run.steps():
        if record.step % spec["epochs"] == 0:
            cpu = meter.clock() - started
            meter.lap(loss=record.loss, update=cpu - sampled[0])
            started = meter.clock()
