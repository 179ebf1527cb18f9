"""Which references there are, and which of them a run can have."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError, refuse_unknown
from alignkit.reference_options import (
    REFERENCE_KINDS,
    AdapterReference,
    CachedReference,
    NoiseBank,
    PrecomputedReference,
)
from alignkit.schema import validate

if TYPE_CHECKING:
    from alignkit.config import RunConfig

REFERENCES = ("auto", "frozen", "adapter_off", "none")


def check_reference(config: RunConfig, modality: str | None) -> None:
    """Raise `ConfigError` for a reference that there is not, or that this run cannot have."""
    reference = config.reference
    if reference is None:
        raise ConfigError(
            f"reference must be {', '.join(map(repr, REFERENCES))}, one of "
            f"{', '.join(cls.__name__ for cls in REFERENCE_KINDS.values())}, or a model (an "
            "object, a folder or a hub name); got None."
        )
    if type(reference) in REFERENCE_KINDS.values():
        validate(reference, "reference")
    if isinstance(reference, NoiseBank):
        _check_bank(config, modality)
        return check_reference(replace(config, reference=reference.of), modality)
    if isinstance(reference, CachedReference):
        if modality == "image":
            raise ConfigError(
                "A cached reference is for text policies: an image's likelihood is an estimate on "
                "a draw of timestep and noise that each step makes anew. Write "
                f"reference={reference.of!r}."
            )
        return check_reference(replace(config, reference=reference.of), modality)
    if isinstance(reference, str) and "/" not in reference and not Path(reference).exists():
        meant = difflib.get_close_matches(reference, REFERENCES, n=1, cutoff=0.7)
        if meant and reference not in REFERENCES:
            refuse_unknown("reference", reference, REFERENCES)
    if reference == "adapter_off" and config.adapter is None and not _adapters(config.policy):
        raise ConfigError(
            "reference='adapter_off' compares the policy with itself without its adapter, and it "
            "has none; got adapter=None. Add an adapter, adapter=LoRA(), or write "
            "reference='frozen'."
        )
    if isinstance(reference, AdapterReference):
        _check_named(reference, config)
    if isinstance(reference, PrecomputedReference):
        _check_table(reference, config, modality)


def _adapters(policy: Any) -> list[str]:
    """Names of the adapters that a policy in hand or in a local folder carries."""
    if isinstance(policy, (str, Path)):
        folder = Path(policy)
        if not (folder / "adapter_config.json").is_file():
            return []
        # peft keeps the others in sub-folders of their names.
        return ["default", *(path.parent.name for path in folder.glob("*/adapter_config.json"))]
    in_hand = isinstance(policy, (tuple, list))
    model = policy[0] if in_hand else getattr(policy, "unet", policy)
    return list(getattr(model, "peft_config", None) or {})


def _check_named(reference: AdapterReference, config: RunConfig) -> None:
    known = _adapters(config.policy)
    if config.adapter is not None or len(known) < 2:
        raise ConfigError(
            f"reference=AdapterReference({reference.name!r}) names an adapter that the policy "
            "carries beside the one it trains; the policy carries "
            f"{', '.join(known) or 'none'}{', and a new one is asked for' * bool(config.adapter)}. "
            "Give a PeftModel or pipeline with both adapters, the trained one active, and no "
            "`adapter`."
        )
    refuse_unknown("adapter of the policy", reference.name, known)


def _check_bank(config: RunConfig, modality: str | None) -> None:
    if modality == "text":
        raise ConfigError(
            "reference=NoiseBank(...) holds draws of timestep and noise, and text has none. Write "
            "reference=PrecomputedReference(table)."
        )
    options = config.data_options
    changing = {"crop": "center", "flip": False, "caption_dropout": 0.0, "latents": "mean"}
    for name, fixed in changing.items():
        if getattr(options, name, fixed) != fixed:
            raise ConfigError(
                "A noise bank knows each row as it is, and augmentation makes another one of it "
                f"in every epoch; got data_options.{name}={getattr(options, name)!r}. Leave it "
                "out, or write reference='auto'."
            )


def _check_table(reference: PrecomputedReference, config: RunConfig, modality: str | None) -> None:
    if modality == "image":
        raise ConfigError(
            "A precomputed reference is for text policies: an image's likelihood is an estimate "
            "on a draw of timestep and noise that each step makes anew, and policy and reference "
            'must share it. Write reference="auto".'
        )
    if config.eval_data is not None:
        raise ConfigError(
            "A precomputed reference knows the rows of `data` by their numbers, and those of "
            "eval_data would be taken for them. Leave eval_data out, or write reference='auto'."
        )
    table = reference.table
    if isinstance(table, (str, Path)) and not Path(table).exists():
        raise ConfigError(f"reference.table must be a file that exists; got {str(table)!r}.")
