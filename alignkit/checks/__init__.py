"""Combinations of options that cannot work, refused before any weight is loaded.

An option is honoured or refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.checks.reference import check_reference
from alignkit.checks.trainer import (
    check_evaluation,
    check_hardware,
    check_outlets,
    check_quantization,
    check_router,
    check_run_folder,
)
from alignkit.errors import ConfigError
from alignkit.methods import METHODS
from alignkit.options import GenerationOptions, ImageOptions, TextOptions
from alignkit.schema import build, hints, refuse_unknown_keys, validate

if TYPE_CHECKING:
    from alignkit.config import RunConfig

_OPTIONS_OF: Mapping[str, type[TextOptions] | type[ImageOptions]] = {
    "text": TextOptions,
    "image": ImageOptions,
}
_GENERATION_OF = {
    "text": ("max_new_tokens", "temperature", "top_p", "top_k", "stop", "engine"),
    "image": ("steps", "guidance_scale", "height", "width"),
}


def check(config: RunConfig, modality: str | None = None) -> None:
    """Raise `ConfigError` for options that do not exist or do not go together.

    Args:
        config: the run, from a file or made in Python.
        modality: "text" or "image" where it is known; None leaves out what depends on it.
    """
    # The loss tables load torch, and reading a file shall not.
    from alignkit.checks.method import check_method

    if type(config.method) not in METHODS.values():
        known = ", ".join(f"{cls.__name__}()" for cls in METHODS.values())
        raise ConfigError(f"method must be one of {known}; got {config.method!r}.")
    validate(config, "")
    for name in ("policy", "data"):
        if getattr(config, name) is None:
            raise ConfigError(f"{name} must be given; got None.")
    if not 0 <= config.seed < 2**63:
        raise ConfigError(f"seed must be between 0 and 2**63 - 1; got {config.seed}.")
    check_method(config, modality)
    check_reference(config, modality)
    _check_adapter(config)
    if config.adapter is not None and config.adapter.quantization is not None:
        check_quantization(config.trainer, modality)
    _check_data_options(config, modality)
    _check_generation(config, modality)
    check_evaluation(config)
    check_hardware(config.trainer, modality)
    check_router(config.trainer, modality)
    check_outlets(config)
    check_run_folder(config)


def resolve_data_options(
    config: RunConfig,
    modality: str,
    default: TextOptions | ImageOptions | None = None,
) -> TextOptions | ImageOptions | None:
    """The `TextOptions` or `ImageOptions` of a run whose modality is known.

    Args:
        config: its `data_options` may still be the mapping of a YAML file.
        modality: "text" or "image".
        default: the options that hold when none are given; a mapping changes them key by key. None:
            the defaults of the class, and no options stay None.
    """
    cls = _OPTIONS_OF[modality]
    given = config.data_options
    if given is None:
        return default
    if isinstance(given, Mapping):
        for key in given:
            for other, kind in _OPTIONS_OF.items():
                if key in hints(kind) and key not in hints(cls):
                    raise ConfigError(
                        f"data_options.{key} is an option of {other} data only, and the policy "
                        f"is of modality {modality!r}. Leave it out."
                    )
        options: TextOptions | ImageOptions = build(cls, given, "data_options")
        if default is None:
            return options
        return replace(default, **{key: getattr(options, key) for key in given})
    if not isinstance(given, cls):
        raise ConfigError(
            f"data_options of a policy of modality {modality!r} must be {cls.__name__}; "
            f"got {type(given).__name__}. Write data_options={cls.__name__}(...)."
        )
    return given


def _check_adapter(config: RunConfig) -> None:
    if config.adapter is not None and config.adapter.dropout > 0:
        raise ConfigError(
            f"adapter.dropout must be 0; got {config.adapter.dropout}. Dropout is off, the "
            "adapter's too: policy and reference are compared on equal terms. Leave it out."
        )
    if config.adapter is not None and _is_adapter(config.policy):
        raise ConfigError(
            "The policy already carries an adapter, and `adapter` asks for another. Leave adapter "
            "out to go on with the one it has, or merge that one first."
        )


def _is_adapter(policy: Any) -> bool:
    """Whether the policy is a language model's adapter: its folder, or peft's model in hand."""
    if isinstance(policy, (str, Path)):
        return (Path(policy) / "adapter_config.json").is_file()
    kinds = type(policy[0]).__mro__ if isinstance(policy, (tuple, list)) and policy else ()
    return any(kind.__name__ == "PeftModel" for kind in kinds)


def _check_data_options(config: RunConfig, modality: str | None) -> None:
    options = config.data_options
    if isinstance(options, Mapping):
        known = {**hints(TextOptions), **hints(ImageOptions)}
        refuse_unknown_keys("data_options", options, known)
    if modality is None:
        return
    found = resolve_data_options(config, modality)
    if isinstance(found, ImageOptions) and found.cache is None and found.cache_dtype != "fp16":
        raise ConfigError(
            "data_options.cache_dtype is that of a cache on disk, and data_options.cache is None; "
            f"got cache_dtype={found.cache_dtype!r}. Give cache a folder or 'auto', or leave "
            "cache_dtype out."
        )


def _check_generation(config: RunConfig, modality: str | None) -> None:
    if config.generation.engine == "vllm" and find_spec("vllm") is None:
        raise ConfigError(
            "generation.engine='vllm' needs the package vllm, which is not installed: "
            "pip install 'alignkit[vllm]', or take engine='transformers'."
        )
    default = GenerationOptions()
    for owner, names in _GENERATION_OF.items():
        for name in names:
            value = getattr(config.generation, name)
            if modality not in (None, owner) and value != getattr(default, name):
                raise ConfigError(
                    f"generation.{name} is an option of {owner} sampling only, and the policy is "
                    f"of modality {modality!r}; got {value!r}. Leave it out."
                )
