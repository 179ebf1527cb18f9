"""From options to parts: wing, reference and objective, with the open numbers filled in."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from alignkit.cached import cached_reference
from alignkit.config import RunConfig
from alignkit.criteria import criterion_of, modifiers_of, supervised_loss_of
from alignkit.errors import ConfigError
from alignkit.methods import SFT, Online, Preference, RewardModel
from alignkit.objectives.policy_gradient import PolicyGradientObjective
from alignkit.objectives.preference import PreferenceObjective
from alignkit.objectives.supervised import SupervisedObjective
from alignkit.online import policy_gradient
from alignkit.places import is_missing
from alignkit.protocols import Wing
from alignkit.rates import default_rate
from alignkit.reference import FrozenModel
from alignkit.reference_cache import StoredReference
from alignkit.reference_options import CachedReference
from alignkit.references import OtherModel, build_reference
from alignkit.reward_models import reward_objective, scalar_options
from alignkit.runtime import Runtime, pick_precision

MODALITIES = {"text": "alignkit.text", "image": "alignkit_diffusion"}
"""Modality -> the package of its wing. A new modality is one line here."""

IMAGE_OPTIONS = ("timestep_weighting", "timesteps")
"""Options of a method that the image wing's likelihood takes."""

Offline = PreferenceObjective | SupervisedObjective
"""The objectives that learn from rows."""
Built = Offline | PolicyGradientObjective
"""The objectives that a run can have."""


def modality_of(policy: Any, what: str = "policy") -> str:
    """ "text" or "image", told by the object's class or by the files of the folder or repository.

    Args:
        policy: a model in one of its forms.
        what: what errors call it.

    Raises:
        ConfigError: if it is neither a language model nor a diffusers pipeline.
    """
    if isinstance(policy, (tuple, list)):
        return "text"
    if not isinstance(policy, (str, Path)):
        names = {cls.__name__ for cls in type(policy).__mro__}
        if "DiffusionPipeline" in names:
            return "image"
        if "PreTrainedModel" in names or "PeftModel" in names:
            raise ConfigError(
                "A language model in hand comes with its tokenizer: "
                f"{what}=({type(policy).__name__}(...), tokenizer)."
            )
        raise ConfigError(
            f"{what} must be a folder, a hub name, (model, tokenizer), or a DiffusionPipeline; got "
            f"{type(policy).__name__}."
        )
    if is_missing(policy):
        raise ConfigError(f"{what} must exist; there is no folder {str(policy)!r}.")
    has_file = _local_file if Path(policy).exists() else partial(_hub_file, what=what)
    if has_file(str(policy), "model_index.json"):
        return "image"
    if part := _pipeline_part(Path(policy)):
        raise ConfigError(
            f"{what} must be a whole pipeline; {str(policy)!r} is its {part} alone. Give the "
            f"folder around it, {str(Path(policy).parent)!r}."
        )
    if has_file(str(policy), "config.json") or has_file(str(policy), "adapter_config.json"):
        return "text"
    raise ConfigError(_neither(str(policy)))


def _pipeline_part(folder: Path) -> str | None:
    """The class of the diffusers model in a local folder, None if there is something else."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config.get("_class_name") if isinstance(config, dict) else None


def _local_file(folder: str, name: str) -> bool:
    return (Path(folder) / name).is_file()


def _hub_file(repository: str, name: str, *, what: str) -> bool:
    """Whether a hub repository has the file; a cached copy is enough."""
    from huggingface_hub import file_exists, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(repository, name), str):
            return True
        return file_exists(repository, name)
    except HFValidationError as error:
        raise ConfigError(
            f"{what}={repository!r} is no folder here and no hub name (owner/name). Check the path."
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{what}={repository!r} is no folder here, and the hub could not be asked: {error}. "
            "Give a local folder, or go online once so that it is cached."
        ) from error


def _neither(policy: str) -> str:
    path = Path(policy)
    if (path / "pytorch_lora_weights.safetensors").exists():
        return (
            f"{policy} is a LoRA of a diffusers pipeline, without its base. Give the base as "
            "policy and "
            f"adapter=LoRA(continue_from={policy!r})."
        )
    fix = f" Did you mean {str(path / 'model')!r}?" if (path / "model").is_dir() else ""
    return (
        "A policy is a language model (config.json) or a diffusers pipeline (model_index.json); "
        f"{policy!r} has neither file.{fix}"
    )


def build_wing(config: RunConfig, modality: str, runtime: Runtime) -> Wing:
    """The policy, loaded and marked for training."""
    method = config.method
    # Options of one modality's likelihood; on the other they were refused.
    options: dict[str, dict[str, Any]] = {
        "text": {
            "neftune_alpha": getattr(method, "neftune_alpha", None),
            "scalar": scalar_options(method),
        },
        "image": {name: getattr(method, name, None) for name in IMAGE_OPTIONS}
        | {"channels_last": config.trainer.channels_last},
    }
    wing: Wing = import_module(MODALITIES[modality]).build(
        config.policy,
        adapter=config.adapter,
        device=runtime.device,
        precision=pick_precision(config.trainer.precision),
        gradient_checkpointing=config.trainer.gradient_checkpointing,
        seed=config.seed,
        **options[modality],
    )
    return wing


def _other_model(config: RunConfig, wing: Wing, runtime: Runtime) -> OtherModel:
    """Loads a model of the policy's modality to compare with."""

    def load(policy: Any) -> Wing:
        other: Wing = import_module(MODALITIES[wing.modality]).build(
            # A copy: what is in hand may be the policy itself, and stays as it is in any case.
            policy if isinstance(policy, (str, Path)) else _copy_of(policy),
            adapter=None,
            device=runtime.device,
            precision=pick_precision(config.trainer.precision),
            gradient_checkpointing=False,
            seed=config.seed,
            beside=wing,
        )
        return other

    return load


def _copy_of(model: Any) -> Any:
    if isinstance(model, (tuple, list)):
        return (copy.deepcopy(model[0]), *model[1:])
    return copy.deepcopy(model)


def _compile(module: Any) -> None:
    """Compile block by block and in place: names of parameters stay, one graph serves all blocks.

    Policy and reference alike, because compiled arithmetic may round otherwise.
    """
    for unit in module.shard_units():
        unit.compile()


def build_objective(
    config: RunConfig, wing: Wing, runtime: Runtime
) -> tuple[Built, dict[str, Any]]:
    """The objective, and the numbers that were filled in."""
    objective, told = _maker(config.method)(config, wing, runtime)
    if config.trainer.compile:
        _compile(wing.backend.module)
    rate = config.trainer.learning_rate
    if rate is None:
        rate = default_rate(config.method, wing.modality, wing.adapter != "none")
    resolved = {
        "modality": wing.modality,
        **told,
        "learning_rate": rate,
        "precision": pick_precision(config.trainer.precision),
        "device": str(torch.device(runtime.device)),
        "processes": runtime.size,
    }
    return objective, resolved


def _maker(method: Any) -> Callable[[RunConfig, Wing, Runtime], tuple[Built, dict[str, Any]]]:
    if isinstance(method, Online):
        return _policy_gradient
    return {SFT: _supervised, RewardModel: _reward}.get(type(method), _preference)


def _policy_gradient(
    config: RunConfig, wing: Wing, runtime: Runtime
) -> tuple[Built, dict[str, Any]]:
    objective, told = policy_gradient(config, wing, _other_model(config, wing, runtime))
    held = objective.reference
    if config.trainer.compile and isinstance(held, FrozenModel):
        _compile(held.module)
    return objective, told


def _router(config: RunConfig, wing: Wing) -> float:
    """The weight of the balance of the policy's experts."""
    wanted = config.trainer.router_aux_loss_coef
    routers: Any = getattr(wing.backend.module, "routers", None)
    return 0.0 if wanted is None else routers.coefficient(wanted)


def _preference(config: RunConfig, wing: Wing, runtime: Runtime) -> tuple[Built, dict[str, Any]]:
    method = config.method
    assert isinstance(method, Preference)
    criterion = criterion_of(method, wing.modality)
    other_model = _other_model(config, wing, runtime)
    if isinstance(config.reference, CachedReference):
        kind, reference = cached_reference(config.reference, config, wing, other_model)
    else:
        needed = criterion.loss.needs_reference
        kind, reference = build_reference(config, wing, needed, other_model)
    held = reference.live if isinstance(reference, StoredReference) else reference
    if config.trainer.compile and isinstance(held, FrozenModel):
        _compile(held.module)
    objective = PreferenceObjective(
        wing.backend,
        reference,
        criterion,
        modifiers=modifiers_of(method, _router(config, wing)),
        seed=config.seed,
        budget=config.trainer.micro_batch,
    )
    return objective, {"beta": criterion.beta, "reference": kind}


def _supervised(config: RunConfig, wing: Wing, runtime: Runtime) -> tuple[Built, dict[str, Any]]:
    method, text = config.method, wing.modality == "text"
    assert isinstance(method, SFT)
    # An image's likelihood is minus half its denoising error, and its loss the error itself; in
    # nats it is the likelihood that counts.
    halved = not text and method.timestep_weighting != "nats"
    objective = SupervisedObjective(
        wing.backend,
        supervised_loss_of(method),
        loss_on=method.loss_on if text else None,
        tokens=text,
        scale=2.0 if halved else 1.0,
        router=_router(config, wing),
        seed=config.seed,
        budget=config.trainer.micro_batch,
    )
    return objective, {"reference": "none"}


def _reward(config: RunConfig, wing: Wing, runtime: Runtime) -> tuple[Built, dict[str, Any]]:
    return reward_objective(config, wing)
