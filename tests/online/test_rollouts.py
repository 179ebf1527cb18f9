"""Online runs on a tiny model: what each step learns from, and when a phase is over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit import A2C, GRPO, PPO, RLOO, ConfigError, GenerationOptions, LoRA, TrainerOptions
from alignkit.api import build
from alignkit.batches import Batch
from alignkit.run import Run
from tests.builders import pair_rows, tiny_lm, tiny_tokenizer
from tests.faults.runs import short_and_odd

PROMPTS = [{"prompt": row["prompt"]} for row in pair_rows(12)]


def online(method: Any, **changed: Any) -> Run:
    trainer = {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-3, "log_every": 1}
    arguments: dict[str, Any] = {
        "reward": short_and_odd,
        "generation": GenerationOptions(max_new_tokens=5),
        "trainer": TrainerOptions(**(trainer | changed.pop("trainer", {})), warmup=0),
    }
    policy = (tiny_lm("llama"), tiny_tokenizer())
    run = build(policy, method, PROMPTS, **(arguments | changed))
    assert isinstance(run, Run)
    return run


def first_batch(run: Run) -> Batch:
    return next(iter(run.trainer.source))


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_defect_02_the_ratio_of_a_first_pass_is_1_to_the_last_bit(critic: Any) -> None:
    """With weights that stand still, all minibatches of the first epoch; the second epoch puts
    other answers together, and float32 sums differ in their last bits.
    """
    method = PPO(rollout_size=8, critic=critic, truncation="as_end", kl_coef=0.1)
    run = online(method, trainer={"learning_rate": 1e-30})
    records = [record.metrics for record in run.steps()]
    for metrics in records[:2]:
        assert metrics["policy/ratio"] == 1.0
        assert metrics["policy/approxkl"] == metrics["policy/clipfrac"] == 0.0
        assert metrics["objective/kl"] == 0.0  # the policy is its own reference, bit by bit
    for metrics in records[2:]:
        assert metrics["policy/ratio"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    "method",
    [PPO(rollout_size=8, entropy_coef=0.1), GRPO(samples_per_prompt=2), RLOO(samples_per_prompt=2)],
    ids=["ppo", "grpo", "rloo"],
)
def test_defect_12_the_split_into_micro_batches_changes_no_gradient(method: Any) -> None:
    run = online(method)
    objective = run.trainer.objective
    batch = first_batch(run)
    found = []
    for budget in ("auto", 1):
        objective.budget = budget  # type: ignore[attr-defined]
        total = sum(objective(micro)[0] for micro in objective.micro_batches(batch, 1))
        assert isinstance(total, torch.Tensor)
        gradients = torch.autograd.grad(total, list(run.trainer.parameters.values()))
        found.append((float(total.detach()), torch.cat([g.flatten() for g in gradients])))
    (one, whole), (other, split) = found
    assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert (whole - split).norm() <= 1e-5 * whole.norm()


def test_adapter_off_is_the_reference_and_the_value_head_shares_the_trunk() -> None:
    run = online(PPO(critic="shared", truncation="as_end"), adapter=LoRA(rank=2))
    history = list(run.steps())
    assert history[0].metrics["objective/kl"] == 0.0
    assert history[-1].metrics["objective/kl"] != 0.0
    assert set(run.trainer.modules) == {"policy"}
    trained = {name for name in run.trainer.parameters if "lora" not in name}
    assert trained == {"policy.value.out.weight", "policy.value.out.bias"}


def test_critic_warmup_leaves_the_policy_as_it_was() -> None:
    for critic in ("separate", "shared"):
        run = online(PPO(critic=critic, critic_warmup=2, truncation="as_end"))  # type: ignore[arg-type]
        before = {name: p.detach().clone() for name, p in run.trainer.parameters.items()}
        own = ("critic.", "policy.value.")
        for record in run.steps():
            if record.step in (2, 3):
                moved = {
                    name
                    for name, p in run.trainer.parameters.items()
                    if not name.startswith(own) and not torch.equal(p, before[name])
                }
                assert bool(moved) == (record.step == 3)
        assert any(not torch.equal(p, before[n]) for n, p in run.trainer.parameters.items())


def test_early_stop_leaves_out_the_rest_of_a_rollout() -> None:
    method = PPO(rollout_size=8, inner_epochs=3, early_stop_kl=1e-9, truncation="as_end")
    run = online(method, trainer={"max_steps": 6})
    numbers = []
    for _ in run.steps():
        numbers.append((run.trainer.source.number, run.trainer.source.at_boundary))  # type: ignore[attr-defined]
    # The first minibatch of a rollout has not moved yet; the second has.
    assert numbers == [(1, False), (1, True), (2, False), (2, True), (3, False), (3, True)]


@pytest.mark.slow
def test_a_save_due_within_a_rollout_waits_for_its_end(tmp_path: Path) -> None:
    """Four steps a rollout; saves come due at 3, 6 and 9."""
    method = PPO(rollout_size=8, truncation="as_end", critic="shared")
    given = {"max_steps": 10, "save_every": 3, "keep_checkpoints": 5}
    run = online(method, trainer=given, run_dir=tmp_path / "run")
    for _ in run.steps():
        pass
    run.finish()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000008"]
    tables = sorted(path.name for path in (tmp_path / "run" / "samples").glob("rollout-*"))
    assert tables == [f"rollout-00000{number}.jsonl" for number in (1, 2, 3)]
    assert "Answers of rollout 3" in (tmp_path / "run" / "report.html").read_text()


def test_ptx_is_the_mean_over_the_tokens_of_the_rows_beside() -> None:
    """The gradient with it less the gradient without is that of the rows' mean likelihood."""
    texts = [{"text": row["chosen"]} for row in pair_rows(8) if isinstance(row["chosen"], str)]
    rows = texts or [{"text": "The sky is blue over the harbour."}, {"text": "Boil fresh water."}]
    run = online(PPO(ptx_coef=3.0, ptx_data=rows, truncation="as_end"))
    objective: Any = run.trainer.objective
    batch = first_batch(run)
    normaliser = float(objective.normaliser(batch))
    pieces = list(objective.micro_batches(batch, 1))
    beside = [piece for piece in pieces if piece.scale is not None]
    total = sum(objective(piece)[0] for piece in beside) / normaliser
    found = run.wing.backend.module(objective.beside(1))
    expected = -3.0 * float(found.total.sum().detach() / found.length.sum())
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)


def reads(refused: Callable[[], Any], *words: str) -> None:
    with pytest.raises(ConfigError) as error:
        refused()
    assert all(word in str(error.value) for word in words), error.value


def test_wrong_combinations_are_refused_with_the_reason() -> None:
    reads(lambda: PPO(kl_mode="loss_k1"), "loss_k1", "gradient of k1")  # type: ignore[arg-type]
    reads(lambda: PPO(kl_mode="reward_k3"), "reward_k3", "another direction")  # type: ignore[arg-type]
    reads(lambda: PPO(kl_target=6.0), "kl_target", "fixed")
    reads(lambda: PPO(kl_controller="adaptive"), "adaptive", "kl_target")
    reads(lambda: PPO(kl_coef=0, kl_controller="constraint", kl_target=1.0), "0 stays 0")
    reads(lambda: PPO(ptx_coef=1.0), "ptx_data")
    reads(lambda: RLOO(truncation="bootstrap"), "bootstrap", "critic")
    reads(lambda: GRPO(samples_per_prompt=1), "at least 2")
    reads(lambda: online(PPO(), reward=None), "reward")
    reads(lambda: online(PPO(), trainer={"max_steps": None, "epochs": 1}), "epochs", "max_steps")
    reads(lambda: online(PPO(rollout_size=6)), "rollout_size", "multiple")
    reads(lambda: online(GRPO(samples_per_prompt=3)), "samples_per_prompt", "multiple")
    reads(lambda: online(A2C(), generation=GenerationOptions(top_p=0.9)), "top_p", "cut-off")
    reads(lambda: online(A2C(), generation=GenerationOptions(temperature=0)), "temperature")
    reads(lambda: online(PPO(), reference="none"), "reference", "kl_coef=0")
    reads(lambda: online(PPO(critic="reward_model")), "reward_model", "folder")
    reads(lambda: online(PPO(inner_epochs=1, early_stop_kl=0.1)), "early_stop_kl")
