"""The JSON schema of a configuration file, so that editors complete and check it."""

from __future__ import annotations

from typing import Any

from alignkit.config import IN_FILES, WRITTEN_BY_RUNS, RunConfig
from alignkit.methods import DPO, METHODS
from alignkit.options import ImageOptions, TextOptions
from alignkit.reference_options import REFERENCE_KINDS
from alignkit.schema import descriptions, hints, json_object, json_type


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors. Naming the losses loads torch."""
    from alignkit.losses import PREFERENCE_LOSSES

    schema = json_object(RunConfig, IN_FILES)
    properties = schema["properties"]
    method = json_object(DPO, {key: hint for key, hint in hints(DPO).items() if key != "keywords"})
    method["properties"]["loss"]["enum"] = list(PREFERENCE_LOSSES)
    for loss in PREFERENCE_LOSSES.values():
        for key, default in loss.keywords.items():
            users = ", ".join(n for n, row in PREFERENCE_LOSSES.items() if key in row.keywords)
            about = {"description": f"option of the losses {users}"}
            method["properties"][key] = json_type(type(default)) | about
    method["properties"] = {"name": {"enum": list(METHODS)}} | method["properties"]
    method["required"] = ["name"]
    properties["method"] = {
        "anyOf": [{"enum": list(METHODS)}, method],
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
