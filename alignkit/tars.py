"""Rows in tar files, as webdataset writes them: members KEY.EXTENSION, one row per KEY.

Members are read in place and never unpacked, so a name or a link in an archive leads nowhere on
this machine; and nothing in one is unpickled.

    KEY.json           a JSON object: columns
    KEY.txt            the prompt, where the JSON has none
    KEY.jpg            the column image
    KEY.0.jpg KEY.1.jpg ...   jpg_0 and jpg_1; from three on, the list images
    KEY.NAME.jpg       the column NAME, such as chosen or rejected
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignkit.errors import DataError

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
PICKLES = ("pickle", "pkl", "pyd", "pth", "pt", "npy", "npz")


class Member(NamedTuple):
    """A regular file in a tar file: where its bytes are."""

    extension: str
    offset: int
    size: int


class TarRows:
    """The rows of some tar files, by number; an index of members is read once.

    Args:
        paths: the files, in the order of their rows.

    Raises:
        DataError: a file is no whole tar file, or holds what cannot be read safely.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._rows: list[tuple[Path, str, list[Member]]] = []
        for path in paths:
            try:
                self._index(path)
            except (tarfile.TarError, OSError, EOFError) as error:
                raise DataError(
                    f"{path} must be a whole, uncompressed tar file; {error}."
                ) from error

    def __len__(self) -> int:
        return len(self._rows)

    def _index(self, path: Path) -> None:
        last = None
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isdir():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not member.isreg():
                    raise DataError(
                        f"{path}: members of a tar file of rows are regular files; {member.name!r} "
                        "is a link or a device. Write the shard again with its contents."
                    )
                if not stem or not extension:
                    raise DataError(
                        f"{path}: members are called KEY.EXTENSION; got {member.name!r}."
                    )
                if extension.lower().rpartition(".")[2] in PICKLES:
                    raise DataError(
                        f"{path}: {member.name!r} may hold pickled objects, which run code when "
                        "read. Write labels as .json and images as image files."
                    )
                key = f"{folder}/{stem}"
                if key != last:
                    self._rows.append((path, key, []))
                    last = key
                self._rows[-1][2].append(Member(extension, member.offset_data, member.size))

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, key, members = self._rows[index]
        row: dict[str, Any] = {}
        numbered: dict[int, bytes] = {}
        with path.open("rb") as file:
            for member in members:
                file.seek(member.offset)
                raw = file.read(member.size)
                if len(raw) != member.size:
                    raise DataError(f"{path} is shorter than when it was opened. Is it whole?")
                name, _, kind = member.extension.lower().rpartition(".")
                if kind == "json":
                    row = {**_columns(raw, f"{path}, {key}.{member.extension}"), **row}
                elif kind == "txt":
                    row.setdefault(name or "text", raw.decode("utf-8", "replace").strip())
                elif kind in IMAGES and name.isdecimal():
                    numbered[int(name)] = raw
                elif kind in IMAGES:
                    row[name or "image"] = raw
        if "text" in row and not {"prompt", "caption"} & set(row):
            row["prompt"] = row.pop("text")
        return {**row, **_by_number(numbered)}


def _by_number(images: Mapping[int, bytes]) -> dict[str, Any]:
    if sorted(images) == [0, 1]:
        return {"jpg_0": images[0], "jpg_1": images[1]}
    return {"images": [images[number] for number in sorted(images)]} if images else {}


def _columns(raw: bytes, name: str) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{name}: not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise DataError(f"{name}: a row's JSON is one object; got {type(found).__name__}.")
    return found
