"""The JSON schema of a configuration file, so that editors complete and check it."""

from __future__ import annotations

from typing import Any

from alignkit.config import IN_FILES, WRITTEN_BY_RUNS, RunConfig
from alignkit.criteria import losses_named_by
from alignkit.methods import DPO, METHODS, Method
from alignkit.options import ImageOptions, TextOptions
from alignkit.reference_options import REFERENCE_KINDS
from alignkit.schema import descriptions, hints, json_object, json_type


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors."""
    schema = json_object(RunConfig, IN_FILES)
    properties = schema["properties"]
    methods = [_method(name, cls) for name, cls in METHODS.items()]
    properties["method"] = {
        "anyOf": [{"enum": list(METHODS)}, *methods],
        "description": descriptions(RunConfig)["method"],
    }
    kinds = [_reference_kind(kind, cls) for kind, cls in REFERENCE_KINDS.items()]
    properties["reference"]["anyOf"] = [{"type": "string"}, *kinds]
    options = json_object(TextOptions)
    options["properties"] = json_object(ImageOptions)["properties"] | options["properties"]
    properties["data_options"]["anyOf"] = [options, {"type": "null"}]
    for name in WRITTEN_BY_RUNS:
        properties[name] = {"description": "written by a run into its config.yaml; ignored"}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "alignkit run",
        **schema,
    }


def _reference_kind(kind: str, cls: type) -> dict[str, Any]:
    schema = json_object(cls)
    schema["properties"] = {"kind": {"enum": [kind]}} | schema["properties"]
    schema["required"] = ["kind", *schema.get("required", [])]
    return schema


def _method(name: str, cls: type[Method]) -> dict[str, Any]:
    """A method's options and those of all losses it may name."""
    schema = json_object(cls, {key: hint for key, hint in hints(cls).items() if key != "keywords"})
    schema["properties"] = {"name": {"enum": [name]}} | schema["properties"]
    schema["required"] = ["name"]
    losses = losses_named_by(cls)
    if not losses:
        return schema
    named: dict[str, Any] = {"enum": list(losses)}
    if cls is DPO:
        weights = {"type": "object", "properties": {key: {"type": "number"} for key in losses}}
        named = {"anyOf": [named, weights | {"additionalProperties": False}]}
    kept = ("description", "default")
    loss = schema["properties"]["loss"]
    schema["properties"]["loss"] = named | {key: loss[key] for key in kept}
    for row in losses.values():
        for key, default in row.keywords.items():
            users = ", ".join(n for n, other in losses.items() if key in other.keywords)
            about = {"description": f"option of the losses {users}"}
            schema["properties"].setdefault(key, json_type(type(default)) | about)
    return schema
