"""A model that is there already, from wherever it lies: a run folder, a model folder, the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from alignkit.errors import ConfigError
from alignkit.options import GenerationOptions, LoRA
from alignkit.parts import MODALITIES, modality_of
from alignkit.protocols import Wing
from alignkit.result import AlignResult
from alignkit.runtime import Runtime, pick_precision
from alignkit.schema import build as build_options
from alignkit.yaml_file import read_yaml


@dataclass(frozen=True)
class Source:
    """Where a model is loaded from.

    Attributes:
        name: what pages call it.
        policy: a folder, a hub name, or objects in memory.
        adapter: `LoRA(continue_from=...)` where an adapter goes onto the policy.
        onto: whether the model is an adapter on the model that it was trained from, so that
            switching it off gives that one.
        told: the run's config.yaml, where there is one.
    """

    name: str
    policy: Any
    adapter: LoRA | None = None
    onto: bool = False
    told: Mapping[str, Any] = field(default_factory=dict)

    @property
    def generation(self) -> GenerationOptions:
        """How the run sampled."""
        return build_options(GenerationOptions, self.told.get("generation") or {}, "generation")

    @property
    def modality(self) -> str:
        return modality_of(self.policy)

    def start(self) -> Source | None:
        """What the run began with; None where nothing says so."""
        policy = self.told.get("policy")
        if not isinstance(policy, str) or policy.startswith("<"):
            return None
        begun = (self.told.get("adapter") or {}).get("continue_from")
        adapter = None if begun is None else LoRA(continue_from=begun)
        return Source(policy if begun is None else begun, policy, adapter, onto=begun is not None)


def source_of(given: Any) -> Source:
    """The model that a run folder, its result, a model folder, a hub name or objects in memory
    stand for.

    Raises:
        ConfigError: a run folder does not say what its adapter belongs to.
    """
    if isinstance(given, AlignResult) and given.run_dir is not None:
        given = given.run_dir
    if not isinstance(given, (str, Path)):
        one = given[0] if isinstance(given, (tuple, list)) else given
        return Source(type(one).__name__, given)
    folder, model = Path(given), Path(given) / "model"
    if not model.is_dir():
        return Source(str(given), str(given), onto=(folder / "adapter_config.json").is_file())
    told = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    begun = told.get("adapter")
    fresh = isinstance(begun, Mapping) and begun.get("continue_from") is None
    plain = Source(str(given), str(model), told=told, onto=fresh)
    whole = ("config.json", "adapter_config.json", "model_index.json")
    if any((model / name).is_file() for name in whole) or not told:
        return plain
    if str(told["policy"]).startswith("<"):
        raise ConfigError(
            f"The adapter in {model} was trained on a pipeline in memory, and no file says "
            "where that lies. Load it onto its base, and give the pipeline."
        )
    # An image adapter's folder does not name its base.
    return replace(plain, policy=told["policy"], adapter=LoRA(continue_from=str(model)))


def load(
    source: Source,
    runtime: Runtime,
    *,
    precision: str = "auto",
    seed: int = 0,
    beside: Wing | None = None,
) -> Wing:
    """The model, ready to be sampled and asked for likelihoods.

    Args:
        source: where it lies.
        runtime: says on which device.
        precision: as in `TrainerOptions`.
        seed: as in `align`.
        beside: the wing of the model that it is compared with.

    Raises:
        ConfigError: it cannot be loaded, or is not comparable to the other one.
    """
    policy, adapter = source.policy, source.adapter
    modality = source.modality
    if beside is not None and modality != beside.modality:
        raise ConfigError(
            f"Models that are compared are of one modality; {source.name!r} is of modality "
            f"{modality!r}, the other one of {beside.modality!r}."
        )
    if modality == "text" and adapter is not None:
        # An adapter's folder names its base and is a model of its own.
        policy, adapter = adapter.continue_from, None
    wing: Wing = import_module(MODALITIES[modality]).build(
        policy,
        adapter=adapter,
        device=runtime.device,
        precision=pick_precision(precision),
        gradient_checkpointing=False,
        seed=seed,
        beside=beside,
    )
    wing.chat = (source.told.get("resolved") or {}).get("chat", wing.chat)
    return wing
