"""The peer's contestants: TRL, as its users run it, in its own Python.

Gradient checkpointing, the length limit and the batch are set by the question; everything else is
TRL's default but for what makes steps comparable: float32, a constant learning rate, rows in the
order of the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench_text.meter import Meter, versions


def dpo(spec: dict[str, Any], meter: Meter) -> None:
    from trl import DPOConfig, DPOTrainer

    _train(
        DPOTrainer,
        _arguments(DPOConfig, spec, precompute_ref_log_probs=spec["cached"]),
        spec,
        meter,
    )


def kto(spec: dict[str, Any], meter: Meter) -> None:
    from trl import KTOConfig, KTOTrainer

    _train(KTOTrainer, _arguments(KTOConfig, spec), spec, meter)


def reward(spec: dict[str, Any], meter: Meter) -> None:
    from trl import RewardConfig, RewardTrainer

    _train(RewardTrainer, _arguments(RewardConfig, spec), spec, meter)


def sft(spec: dict[str, Any], meter: Meter) -> None:
    from trl import SFTConfig, SFTTrainer

    _train(SFTTrainer, _arguments(SFTConfig, spec, packing=spec["packed"]), spec, meter)


def reference(spec: dict[str, Any], meter: Meter) -> None:
    """Every round prepares and precomputes rows of its own, in a new trainer on the same model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    _get_ready(spec, meter)
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    told = spec | {"batch": 8}  # TRL's default, which sets the batch of the pass
    arguments = _arguments(DPOConfig, told, model_init_kwargs=None, precompute_ref_log_probs=True)
    rows = _rows(spec)
    meter.started(versions=versions("trl", "torch", "transformers"))
    for start in range(0, len(rows), spec["batch"]):
        some = rows.select(range(start, start + spec["batch"]))
        DPOTrainer(model=model, args=arguments, train_dataset=some, processing_class=tokenizer)
        meter.lap()


def tokenise(spec: dict[str, Any], meter: Meter) -> None:
    """The trainer's preparation of a dataset, without a trainer around it."""
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    _get_ready(spec, meter)
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    arguments, rows = _arguments(DPOConfig, spec), _rows(spec)
    bare = object.__new__(DPOTrainer)
    bare._tokenizer = tokenizer
    meter.started(versions=versions("trl", "torch", "transformers"))
    for _ in range(spec["steps"]):
        bare._prepare_dataset(rows, tokenizer, arguments, "train")
        meter.lap()


def _get_ready(spec: dict[str, Any], meter: Meter) -> None:
    import datasets
    import peft  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    datasets.disable_caching()
    datasets.disable_progress_bars()
    if spec["head"] == "completions":
        score_completions_only()
    meter.imported()


def score_completions_only() -> None:
    """Let TRL's LM head skip prompts and padding, as it does where Triton runs.

    Elsewhere it scores every position of the batch, which no user of a GPU pays for.
    """
    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda device: True


def _rows(spec: dict[str, Any]) -> Any:
    from datasets import Dataset

    lines = Path(spec["rows"]).read_text().splitlines()
    return Dataset.from_list([json.loads(line) for line in lines])


def _arguments(config: Any, spec: dict[str, Any], **more: Any) -> Any:
    size = spec["micro"] or spec["batch"]
    given = {
        "output_dir": spec["scratch"],
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": spec["batch"] // size,
        "max_steps": spec["steps"],
        "learning_rate": spec["rate"],
        "lr_scheduler_type": "constant",
        "max_length": spec["max_length"],
        "gradient_checkpointing": spec["checkpointing"],
        "train_sampling_strategy": "sequential",
        "bf16": False,
        "use_cpu": True,
        "model_init_kwargs": {"dtype": "float32"},
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return config(**(given | more))


def _train(kind: Any, arguments: Any, spec: dict[str, Any], meter: Meter) -> None:
    from peft import LoraConfig
    from transformers import TrainerCallback

    _get_ready(spec, meter)
    given: dict[str, Any] = {}
    if spec["lora"]:
        rank = spec["lora"]
        given["peft_config"] = LoraConfig(
            r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    trainer = kind(model=spec["model"], args=arguments, train_dataset=_rows(spec), **given)
    losses: list[Any] = []
    step = trainer.training_step

    def noting(*given: Any, **named: Any) -> Any:
        loss = step(*given, **named)
        losses.append(loss)
        return loss

    class Turns(TrainerCallback):
        def on_train_begin(self, *given: Any, **named: Any) -> None:
            meter.started(versions=versions("trl", "torch", "transformers"))

        def on_step_end(self, *given: Any, **named: Any) -> None:
            meter.lap(loss=sum(losses))
            losses.clear()

    trainer.training_step = noting
    trainer.add_callback(Turns())
    meter.count(trainer.model)
    if spec["reads"]:
        meter.watch(trainer.model)
    trainer.train()


def ppo(spec: dict[str, Any], meter: Meter) -> None:
    """TRL 1.12's PPOTrainer, the last one: a lap is a rollout with all of its updates."""
    import copy

    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from bench_text.scorer import classifier

    _get_ready(spec | {"head": "all"}, meter)
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(spec["model"], dtype="float32")
    scorer = classifier(spec["model"])
    rows = _rows(spec)
    asked = rows.map(
        lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]},
        remove_columns=rows.column_names,
    )
    arguments = PPOConfig(
        output_dir=spec["scratch"],
        learning_rate=spec["rate"],
        per_device_train_batch_size=spec["batch"],
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=spec["epochs"],
        total_episodes=spec["batch"] * spec["steps"],
        local_rollout_forward_batch_size=spec["batch"],
        response_length=spec["tokens"],
        stop_token="eos",
        temperature=1.0,
        num_sample_generations=0,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=policy,
        ref_model=copy.deepcopy(policy),
        reward_model=scorer,
        value_model=copy.deepcopy(scorer),
        train_dataset=asked,
        eval_dataset=asked,
    )
    began: list[float] = []
    accumulate = trainer.accelerator.accumulate

    def noting(*given: Any) -> Any:
        began.append(meter.clock())
        return accumulate(*given)

    class Turns(TrainerCallback):
        def on_train_begin(self, *given: Any, **named: Any) -> None:
            meter.started(versions=versions("trl", "torch", "transformers"))

        def on_step_end(self, *given: Any, **named: Any) -> None:
            update = meter.clock() - began[0]
            began.clear()
            meter.lap(loss=0.0, update=update)

    trainer.accelerator.accumulate = noting
    trainer.add_callback(Turns())
    trainer.train()
