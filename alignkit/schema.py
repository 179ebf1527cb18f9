"""Option dataclasses from plain data, and the JSON schema of that data, both by the type hints.

The classes of `alignkit.options` are the only place where a field, its type, its default and its
meaning are written down.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from inspect import getdoc
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from alignkit.errors import ConfigError, nearest

T = TypeVar("T")

_MISMATCH = object()
_WORDS: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    NoneType: "null",
    Path: "a path",
}


def hints(cls: type) -> dict[str, Any]:
    """Field name -> resolved type hint, in the order of the fields."""
    resolved = get_type_hints(cls)
    return {f.name: resolved[f.name] for f in fields(cls)}


def dotted(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def refuse_unknown_keys(path: str, given: Iterable[object], known: Iterable[str]) -> None:
    """Raise `ConfigError` for the first of `given` that is not an option at `path`."""
    known = list(known)
    for key in given:
        if key not in known:
            raise ConfigError(
                f"{dotted(path, key)} is not an option.{nearest(str(key), known)} "
                f"Known: {', '.join(known)}."
            )


def expected(hint: Any) -> str:
    """What `hint` admits, in words."""
    if hint in _WORDS:
        return _WORDS[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin in (Union, UnionType):
        return " or ".join(expected(member) for member in args)
    if origin in (tuple, Sequence):
        return "a list of whole numbers" if args[0] is int else "a list of text"
    if origin is Mapping:
        return "a mapping"
    if origin is Callable:
        return "a function"
    return f"the options of {hint.__name__}"


def read(hint: Any, value: object, path: str) -> Any:
    """`value` as the type `hint`, or a `ConfigError` that names `path`.

    A number given as text is read as a number where one is expected: YAML 1.1 takes `1e-5` for
    text.
    """
    converted = _convert(hint, value, path)
    if converted is _MISMATCH:
        raise _wrong_type(hint, value, path)
    return converted


def require(hint: Any, value: object, path: str) -> None:
    """Like `read`, for a value that is used as it is: what would be converted is refused."""
    converted = value if hint is Any else read(hint, value, path)
    if converted is not value and converted != value:
        raise _wrong_type(hint, value, path)


def _wrong_type(hint: Any, value: object, path: str) -> ConfigError:
    kind = type(value).__name__
    return ConfigError(f"{path} must be {expected(hint)}; got {value!r} ({kind}).")


def _convert(hint: Any, value: Any, path: str) -> Any:
    if hint is Any:
        return value
    if hint is float:
        return _to_float(value)
    if hint is int:
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        return int(value) if whole else _MISMATCH
    if is_dataclass(hint):
        return _to_dataclass(hint, value, path)
    if isinstance(hint, type):
        return value if isinstance(value, hint) else _MISMATCH
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value if value in args else _MISMATCH
    if origin in (Union, UnionType):
        for member in sorted(args, key=lambda member: member is float):  # an int stays an int
            converted = _convert(member, value, path)
            if converted is not _MISMATCH:
                return converted
        return _MISMATCH
    if origin in (tuple, Sequence):
        if not isinstance(value, Sequence) or isinstance(value, str):
            return _MISMATCH
        return tuple(read(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            return _MISMATCH
        return {
            read(args[0], key, f"the key {key!r} of {path}"): read(args[1], item, dotted(path, key))
            for key, item in value.items()
        }
    return value if callable(value) else _MISMATCH


def _to_float(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return _MISMATCH
    if isinstance(value, bool) or not isinstance(value, Real) or value != value:
        return _MISMATCH
    return float(value)


def _to_dataclass(cls: Any, value: Any, path: str) -> Any:
    if isinstance(value, cls):
        validate(value, path)
        return value
    return build(cls, value, path) if isinstance(value, Mapping) else _MISMATCH


def build(cls: type[T], given: Mapping[str, Any], path: str) -> T:
    """An instance of the option class `cls` from plain data."""
    known = hints(cls)
    refuse_unknown_keys(path, given, known)
    values = {key: read(known[key], value, dotted(path, key)) for key, value in given.items()}
    missing = [
        f.name
        for f in fields(cls)  # type: ignore[arg-type]
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        needed = ", ".join(dotted(path, name) for name in missing)
        raise ConfigError(f"{needed} must be given; got only {', '.join(given) or 'nothing'}.")
    return cls(**values)


def validate(options: Any, path: str) -> None:
    """Raise `ConfigError` where a field of the dataclass `options` is not what its hint says."""
    for name, hint in hints(type(options)).items():
        require(hint, getattr(options, name), dotted(path, name))


def json_type(hint: Any) -> dict[str, Any]:
    """The JSON schema of what `read(hint, ...)` accepts from a file."""
    simple = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}
    if hint is Any:
        return {}
    if hint in simple:
        return {"type": simple[hint]}
    if is_dataclass(hint):
        return json_object(hint)  # type: ignore[arg-type]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, UnionType):
        members = [json_type(m) for m in args if m is not Path and get_origin(m) is not Callable]
        return _any_of(members)
    if origin in (tuple, Sequence):
        return {"type": "array", "items": json_type(args[0])}
    return {"type": "object", "additionalProperties": json_type(args[1])}


def _any_of(members: list[dict[str, Any]]) -> dict[str, Any]:
    if any(member.keys() != {"type"} for member in members):
        return {"anyOf": members} if len(members) > 1 else members[0]
    names = [member["type"] for member in members]
    if "number" in names:  # every integer is a number
        names = [name for name in names if name != "integer"]
    return {"type": names if len(names) > 1 else names[0]}


def json_object(cls: type, only: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON schema of an option class; `only` gives the fields and hints to show (None: all)."""
    about = descriptions(cls)
    defaults = {f.name: f.default for f in fields(cls) if f.default is not MISSING}
    made = [f.name for f in fields(cls) if f.default_factory is not MISSING]
    properties = {}
    for name, hint in (hints(cls) if only is None else only).items():
        properties[name] = json_type(hint)
        if name in about:
            properties[name]["description"] = about[name]
        if name in defaults and not is_dataclass(defaults[name]):
            default = defaults[name]
            properties[name]["default"] = list(default) if isinstance(default, tuple) else default
    required = [name for name in properties if name not in defaults and name not in made]
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | ({"required": required} if required else {})


def descriptions(cls: type) -> dict[str, str]:
    """Field name -> its text in the docstring's Attributes section."""
    section = re.search(r"^Attributes:\n((?:    .*\n?|\n)*)", getdoc(cls) or "", re.MULTILINE)
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", section[1].rstrip()) if section else ():
        names, _, text = " ".join(entry.split()).partition(": ")
        found |= dict.fromkeys(names.split(", "), text)
    return found
