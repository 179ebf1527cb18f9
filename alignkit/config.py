"""A run as one value: from YAML to frozen dataclasses and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from alignkit.checks import check, resolve_data_options
from alignkit.errors import ConfigError, refuse_unknown
from alignkit.methods import METHODS, Method
from alignkit.mixtures import Mixture
from alignkit.options import (
    EarlyStop,
    GenerationOptions,
    ImageOptions,
    LoRA,
    TextOptions,
    TrainerOptions,
)
from alignkit.records import differences
from alignkit.reference_options import REFERENCE_KINDS, ReferenceOption
from alignkit.schema import (
    build,
    dotted,
    hints,
    read,
    refuse_unknown_keys,
)
from alignkit.yaml_file import override, read_yaml

__all__ = [
    "RunConfig",
    "changed_keys",
    "check",
    "from_file",
    "from_mapping",
    "override",
    "resolve_data_options",
    "to_mapping",
]


@dataclass(frozen=True)
class RunConfig:
    """Everything that one call of `align()` is told.

    Attributes:
        policy: a local folder or hub name of an LLM or a diffusers pipeline; in Python also objects
            in memory. A relative path starts at the working directory, not at the YAML file.
        method: what to optimise: a name, or a mapping with `name` and the method's options.
        data: a file (jsonl, json, csv, parquet), a folder or a hub name, or a mapping `mixture`
            from several of them to their weights; in Python also rows.
        eval_data: like data, or a mapping from set names to such.
        reference: "auto", "frozen", "adapter_off", "none", a path or hub name, or a mapping with
            `kind` (adapter, cached, ema, synced, precomputed) and its options. Auto: a fresh
            adapter is switched off; one that is continued, or a fully trained model, is copied.
        reward: scores answers, for online methods.
        judge: compares two answers, for online methods.
        adapter: the low-rank adapter to train; without one all weights are trained.
        data_options: how rows are read: the options of text or of images, as the policy needs.
        generation: how answers are sampled, for reports and online methods.
        trainer: how the optimizer runs.
        run_dir: the run folder; without one nothing is written.
        resume: "auto" continues an interrupted run of this folder and returns a finished one,
            "must" refuses to start anew, "never" refuses to continue; or a checkpoint folder.
        seed: the key of every random draw.
    """

    policy: Any
    method: Method
    data: Any
    _: KW_ONLY
    eval_data: Any = None
    reference: Any = "auto"
    reward: Any = None
    judge: Any = None
    adapter: LoRA | None = None
    data_options: Mapping[str, Any] | TextOptions | ImageOptions | None = None
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    run_dir: str | Path | None = None
    resume: str | Path = "auto"
    seed: int = 0


IN_FILES: Mapping[str, Any] = {
    **hints(RunConfig),
    "policy": str,
    "data": str | Mapping[str, Any],
    "eval_data": str | Mapping[str, str] | None,
    "reference": str | Mapping[str, Any],
    "reward": str | Mapping[str, Any] | None,
    "judge": str | None,
    "run_dir": str | None,
    "resume": str,
    "generation": GenerationOptions | None,
    "trainer": TrainerOptions | None,
}
"""The type hints of a file's top level: those of `RunConfig`, without objects in memory."""

WRITTEN_BY_RUNS = ("environment", "resolved")
_REQUIRED = ("policy", "method", "data")
_IN_MEMORY = "<in memory: "


def from_mapping(mapping: Mapping[str, Any], where: str = "config") -> RunConfig:
    """The run that plain data (a parsed YAML file) describes.

    Args:
        mapping: the keys of `RunConfig`. `environment` and `resolved`, which a run writes into its
            own config.yaml, are ignored, so that this file runs again.
        where: what error messages call the mapping.

    Raises:
        ConfigError: naming the dotted path of the key that is unknown, missing or of wrong type.
    """
    try:
        return _read_run({k: v for k, v in mapping.items() if k not in WRITTEN_BY_RUNS})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _read_run(given: dict[str, Any]) -> RunConfig:
    if "recipe" in given:
        raise ConfigError(
            f"A recipe is several runs, and this is the place of one; got {given['recipe']!r}. Run "
            "it by `alignkit train FILE`, or from Python by alignkit.recipes.run_recipe()."
        )
    refuse_unknown_keys("", given, IN_FILES)
    for name in _REQUIRED:
        if given.get(name) is None:
            raise ConfigError(f"{name} must be given; add a line `{name}: ...` at the top level.")
    for path, value in _leaves(given):
        if isinstance(value, str) and value.startswith(_IN_MEMORY):
            raise ConfigError(
                f"{path} is {value!r}: this run was made from objects in memory, which a file "
                "cannot hold. Call align() from Python with the same objects."
            )
    return RunConfig(**{name: _read_key(name, value) for name, value in given.items()})


def _read_key(name: str, value: Any) -> Any:
    if name == "method":
        return _read_method(value)
    if name == "data_options":
        return _read_data_options(value)
    if name == "reference" and isinstance(value, Mapping):
        return _read_reference(value)
    if name == "data" and isinstance(value, Mapping):
        refuse_unknown_keys("data", value, ["mixture"])
        return Mixture(read(Mapping[str, float], value.get("mixture"), "data.mixture"))
    if name in ("generation", "trainer") and value is None:
        value = {}  # a section whose lines are all commented out
    return read(IN_FILES[name], value, name)


def _read_method(value: Any) -> Method:
    given = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = given.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(
            f"method must be a name or a mapping with a name, such as {{name: dpo}}; got {value!r}."
        )
    refuse_unknown("method", name, METHODS)
    cls = METHODS[name]
    known = {key: hint for key, hint in hints(cls).items() if key != "keywords"}
    return cls(
        **{
            str(key): read(known[key], item, f"method.{key}") if key in known else item
            for key, item in given.items()
        }
    )


def _read_reference(value: Mapping[str, Any]) -> ReferenceOption:
    kind = value.get("kind")
    if not isinstance(kind, str):
        raise ConfigError(
            "reference as a mapping has a kind, such as {kind: ema, decay: 0.99}; got "
            f"{dict(value)!r}. Kinds: {', '.join(REFERENCE_KINDS)}."
        )
    refuse_unknown("reference.kind", kind, REFERENCE_KINDS)
    given = {key: item for key, item in value.items() if key != "kind"}
    option: ReferenceOption = build(REFERENCE_KINDS[kind], given, "reference")
    return option


def _read_data_options(value: Any) -> Mapping[str, Any] | None:
    """Checked against text's and images' options together: the modality is not known yet."""
    known = {**hints(TextOptions), **hints(ImageOptions)}
    given = read(Mapping[str, Any] | None, value, "data_options")
    if given is None:
        return None
    refuse_unknown_keys("data_options", given, known)
    return {key: read(known[key], item, f"data_options.{key}") for key, item in given.items()}


def from_file(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file describes.

    Args:
        path: the file. Relative paths *in* it start at the working directory.
        overrides: `key.sub=value` each, the value in YAML; they win over the file.

    Raises:
        ConfigError: if the file cannot be read, or does not describe a run.
    """
    return from_mapping(override(read_yaml(path), overrides), where=str(path))


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """Every field of `config`, defaults included, as plain data that YAML and JSON can hold.

    Objects in memory become text such as "<in memory: Qwen2ForCausalLM>", which `from_mapping`
    refuses.
    """
    mapping = {f.name: to_plain(getattr(config, f.name)) for f in fields(config)}
    method = {f.name: to_plain(getattr(config.method, f.name)) for f in fields(config.method)}
    keywords = method.pop("keywords", {})
    mapping["method"] = {"name": config.method.name, **method, **keywords}
    return mapping


def to_plain(value: Any) -> Any:
    """Options, paths and numbers as YAML and JSON hold them; anything else as what it is called."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Mixture):
        return {"mixture": {name: to_plain(weight) for name, _, weight in value.entries()}}
    if isinstance(value, _OPTIONS):
        kind = {"kind": value.kind} if isinstance(value, ReferenceOption) else {}
        return kind | {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and all(isinstance(item, (str, Real)) for item in value):
        return [to_plain(item) for item in value]
    return f"{_IN_MEMORY}{_describe(value)}>"


_OPTIONS = (
    TrainerOptions,
    TextOptions,
    ImageOptions,
    GenerationOptions,
    LoRA,
    EarlyStop,
    *REFERENCE_KINDS.values(),
)


def _describe(value: Any) -> str:
    if isinstance(value, tuple):  # (model, tokenizer)
        return _describe(value[0])
    name = getattr(value, "__name__", type(value).__name__)
    rows = isinstance(value, list) or (hasattr(value, "column_names") and hasattr(value, "__len__"))
    return f"{name} of {len(value)} rows" if rows else name


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted paths at which two results of `to_mapping` differ in what the numbers depend on.

    Where a run is written, how it resumes and who is told of it do not matter.
    """
    return [path for path, *_ in differences(old, new, NOT_COMPARED)]


NOT_COMPARED = {
    *WRITTEN_BY_RUNS,
    "run_dir",
    "resume",
    "reference.folder",
    "trainer.trackers",
    "trainer.push_to_hub",
}
"""What of a run its numbers do not depend on."""


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in `value` that is not a mapping."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, dotted(path, key))
    else:
        yield path, value
