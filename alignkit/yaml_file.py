"""YAML as people mean it: the floats of YAML 1.2, no key given twice, errors with their line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from alignkit.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader; `1e-5` is a number, and of two equal keys none is silently dropped."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {key.value!r} is given twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """The data in `text`; `where` is what error messages call it."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ConfigError(f"{where}{line}: this is not valid YAML: {error.problem}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: this is not valid YAML: {error}.") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds."""
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name the YAML file, such as {path}/config.yaml.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"There is no file {path} in {Path.cwd()}; give the path of a YAML file."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a text file: {error}.") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path} must hold a mapping with policy, method and data; got {type(data).__name__}."
        )
    return data


def override(mapping: Mapping[str, Any], items: Sequence[str]) -> dict[str, Any]:
    """`mapping` with every `key.sub=value` of `items` set, the value read as YAML.

    A bare method name makes way for its mapping form, so that `method.beta=0.2` works on both.
    """
    result = dict(mapping)
    for item in items:
        path, equals, text = item.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise ConfigError(f"An override is written key.sub=value; got {item!r}.")
        inner = result
        for depth, key in enumerate(keys[:-1]):
            section = inner.get(key)
            if keys[: depth + 1] == ["method"] and isinstance(section, str):
                section = {"name": section}
            if section is not None and not isinstance(section, Mapping):
                place = ".".join(keys[: depth + 1])
                raise ConfigError(
                    f"{path} cannot be set: {place} is {section!r}, which has no options of its "
                    f"own. Set {place} itself."
                )
            inner[key] = dict(section or {})
            inner = inner[key]
        inner[keys[-1]] = parse_yaml(text, f"override {item!r}")
    return result
