"""What an online method asks for, checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError
from alignkit.methods import Online
from alignkit.reference_options import CachedReference, NoiseBank, PrecomputedReference

if TYPE_CHECKING:
    from alignkit.config import RunConfig


def check_online(method: Online, config: RunConfig, modality: str | None) -> None:
    """Raise `ConfigError` for an online method that cannot run as asked."""
    name = type(method).__name__
    if modality == "image":
        raise ConfigError(
            f"{name} learns from answers in tokens, and an image pipeline writes none. Take DPO() "
            "on pairs of pictures; align_rounds() and sample_preferences() make them by a reward."
        )
    if config.judge is not None:
        raise ConfigError(
            f"judge compares two answers, and {name} scores each by itself. Give reward=."
        )
    if config.reward is None:
        raise ConfigError(
            f"{name} learns from scores of its own answers, so it needs a reward; got none. Give "
            "reward=: a function of (prompts, responses, rows), or a reward model's folder."
        )
    if config.trainer.epochs is not None:
        raise ConfigError(
            f"trainer.epochs counts passes over data, and {name} writes its own; got "
            f"epochs={config.trainer.epochs}. Write max_steps, the optimizer steps."
        )
    _check_sizes(method, config)
    _check_sampling(name, config)
    _check_reference(method, config)
    _check_critic(method, config)
    if config.trainer.router_aux_loss_coef is not None:
        raise ConfigError(
            "trainer.router_aux_loss_coef belongs to methods that learn from data; got "
            f"{config.trainer.router_aux_loss_coef!r} with {name}. Leave it out."
        )


def _check_sizes(method: Online, config: RunConfig) -> None:
    """Rollouts, minibatches and groups that do not go into one another."""
    batch, samples, given = (
        config.trainer.batch_size,
        method.samples_per_prompt,
        method.rollout_size,
    )
    if batch % samples:
        raise ConfigError(
            "trainer.batch_size counts answers, and those to one prompt stay together: it must be "
            f"a multiple of method.samples_per_prompt={samples}; got {batch}. Write "
            f"batch_size={max(samples, batch - batch % samples)}."
        )
    if given is not None and given % batch:
        raise ConfigError(
            "method.rollout_size must be a multiple of trainer.batch_size, so that every answer "
            f"is learned from equally often; got {given} and {batch}. Write "
            f"rollout_size={max(1, round(given / batch)) * batch}."
        )
    steps = (given or batch) // batch * method.inner_epochs
    limit = getattr(method, "early_stop_kl", None)
    if limit is not None and steps == 1:
        raise ConfigError(
            f"method.early_stop_kl={limit!r} leaves out the rest of a rollout's minibatches, and "
            "there is one. Take inner_epochs above 1 or a larger rollout_size, or leave it out."
        )


def _check_sampling(name: str, config: RunConfig) -> None:
    """Sampling from another distribution than the one whose likelihood is learned."""
    generation = config.generation
    if generation.temperature == 0:
        raise ConfigError(
            f"{name} learns from answers that differ, and generation.temperature=0 always takes "
            "the likeliest token. Write temperature=1.0."
        )
    for option, neutral in (("top_p", 1.0), ("top_k", 0)):
        value = getattr(generation, option)
        if value != neutral:
            raise ConfigError(
                f"generation.{option}={value!r} samples from a cut-off distribution, of which the "
                "policy's likelihood is not the likelihood: ratios and KL would be those of "
                f"another one. Leave {option} out; temperature is honoured everywhere."
            )


def _check_reference(method: Any, config: RunConfig) -> None:
    wanted = config.reference
    if method.kl_coef == 0 and wanted not in ("auto", "none"):
        raise ConfigError(
            f"method.kl_coef=0 asks for no reference; got reference={wanted!r}. Give a kl_coef, or "
            "leave reference out."
        )
    if method.kl_coef and isinstance(wanted, str) and wanted == "none":
        raise ConfigError(
            f"method.kl_coef={method.kl_coef!r} is the strength of the KL to a reference; got "
            "reference='none'. Write reference='auto', or kl_coef=0."
        )
    if isinstance(wanted, (CachedReference, NoiseBank, PrecomputedReference)):
        raise ConfigError(
            f"reference={type(wanted).__name__}(...) holds numbers of answers in the data, and "
            f"{type(method).__name__} writes new ones. Write reference='auto'."
        )


def _check_critic(method: Any, config: RunConfig) -> None:
    if method.critic is None:
        return
    if method.critic == "reward_model" and not _is_folder(config.reward):
        raise ConfigError(
            "method.critic='reward_model' starts the critic as the reward model's folder, and the "
            f"reward is none; got reward={config.reward!r}. Give such a folder, or write "
            "critic='separate'."
        )
    if method.critic_warmup and config.trainer.weight_decay:
        raise ConfigError(
            "method.critic_warmup holds the policy still, and trainer.weight_decay="
            f"{config.trainer.weight_decay} would move it. Leave one of them out."
        )


def _is_folder(reward: Any) -> bool:
    return isinstance(reward, (str, Path)) and (Path(reward) / "config.json").is_file()
