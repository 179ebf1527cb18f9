"""The usable rows of a data set as columns: a million of them are arrays, not objects.

N rows, M images, row by row. Rows, pictures and labels are made when they are asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from alignkit.labels import Label, Labels
from alignkit_diffusion.pictures import Picture
from alignkit_diffusion.rows import ImageRow

NUMBERS = ("weight", "target_margin", "p_chosen")
"""Optional numbers of a row, by the batch's names; NaN where a row has none."""

_PER_ROW = ("number", "prompt", "images", "desirable", *NUMBERS)
_PER_IMAGE = ("digest", "height", "width", "column", "place", "rank", "score")
_TYPES = {
    "number": "i8",
    "prompt": "i4",
    "images": "i4",
    "desirable": "i1",
    "height": "i4",
    "width": "i4",
    "column": "i4",
    "place": "i4",
    "rank": "i4",
    "score": "f4",
}


class RowTable:
    """Usable rows, in their order.

    Attributes:
        columns: arrays by name. Of a row: `number` in the data, `prompt` (its place among
            `prompts`), `images` (how many), `desirable` (-1: none), and `NUMBERS`. Of an image:
            `digest` (M, 16) uint8, `height`, `width`, `column` (its place among `sources`), `place`
            (-1: none), `rank`, `score` (NaN: none).
        prompts: each once.
        sources: names of columns that hold images.
    """

    def __init__(
        self, columns: Mapping[str, np.ndarray], prompts: Sequence[str], sources: Sequence[str]
    ) -> None:
        self.columns = dict(columns)
        self.prompts = list(prompts)
        self.sources = list(sources)
        self._starts = np.concatenate([[0], np.cumsum(self.columns["images"], dtype="i8")])

    @classmethod
    def of(cls, rows: Sequence[ImageRow]) -> RowTable:
        """From rows."""
        prompts = _numbered(row.prompt for row in rows)
        pictures = [picture for row in rows for picture in row.pictures]
        sources = _numbered(picture.column for picture in pictures)
        none = np.nan
        found: dict[str, Sequence[Any]] = {
            "number": [row.number for row in rows],
            "prompt": [prompts[row.prompt] for row in rows],
            "images": [len(row.pictures) for row in rows],
            "desirable": [-1 if r.label.desirable is None else r.label.desirable for r in rows],
            "height": [picture.height for picture in pictures],
            "width": [picture.width for picture in pictures],
            "column": [sources[picture.column] for picture in pictures],
            "place": [-1 if picture.place is None else picture.place for picture in pictures],
            "rank": [rank for row in rows for rank in row.label.rank],
            "score": [s for r in rows for s in r.label.score or (none,) * len(r.label.rank)],
            **{name: [row.label.numbers.get(name, none) for row in rows] for name in NUMBERS},
        }
        columns = {name: np.array(found[name], _TYPES.get(name, "f4")) for name in found}
        raw = b"".join(bytes.fromhex(picture.digest) for picture in pictures)
        columns["digest"] = np.frombuffer(raw, dtype=np.uint8).reshape(-1, 16)
        return cls(columns, list(prompts), list(sources))

    @classmethod
    def joined(cls, tables: Sequence[RowTable]) -> RowTable:
        """Tables one after the other."""
        prompts = _numbered(prompt for table in tables for prompt in table.prompts)
        sources = _numbered(source for table in tables for source in table.sources)
        parts = []
        for table in tables:
            columns = dict(table.columns)
            for name, known, there in (
                ("prompt", prompts, table.prompts),
                ("column", sources, table.sources),
            ):
                renumbered = np.array([known[one] for one in there], "i4")
                columns[name] = renumbered[columns[name]] if there else columns[name]
            parts.append(columns)
        columns = {
            name: np.concatenate([part[name] for part in parts]) for name in _PER_ROW + _PER_IMAGE
        }
        return cls(columns, list(prompts), list(sources))

    def select(self, mask: np.ndarray) -> RowTable:
        """The rows where `mask` (N,) is true."""
        if mask.all():
            return self
        of_images = np.repeat(mask, self.columns["images"])
        columns = {name: self.columns[name][mask] for name in _PER_ROW}
        columns |= {name: self.columns[name][of_images] for name in _PER_IMAGE}
        return RowTable(columns, self.prompts, self.sources)

    def __len__(self) -> int:
        return len(self.columns["number"])

    @property
    def num_images(self) -> int:
        """Images of all rows."""
        return len(self.columns["height"])

    def number(self, row: int) -> int:
        """A row's number in the data."""
        return int(self.columns["number"][row])

    def prompt(self, row: int) -> str:
        """A row's prompt."""
        return self.prompts[self.columns["prompt"][row]]

    def pictures(self, row: int) -> list[Picture]:
        """A row's images, in the order of its label."""
        number, columns = self.number(row), self.columns
        found = []
        for at in range(self._starts[row], self._starts[row + 1]):
            place = int(columns["place"][at])
            found.append(
                Picture(
                    row=number,
                    column=self.sources[columns["column"][at]],
                    digest=columns["digest"][at].tobytes().hex(),
                    height=int(columns["height"][at]),
                    width=int(columns["width"][at]),
                    place=None if place < 0 else place,
                )
            )
        return found

    def label(self, row: int) -> Label:
        """What a row says of its images."""
        images = slice(self._starts[row], self._starts[row + 1])
        score = self.columns["score"][images]
        numbers = {name: float(self.columns[name][row]) for name in NUMBERS}
        desirable = int(self.columns["desirable"][row])
        return Label(
            rank=tuple(self.columns["rank"][images].tolist()),
            score=() if np.isnan(score).all() else tuple(score.tolist()),
            desirable=None if desirable < 0 else bool(desirable),
            numbers={name: value for name, value in numbers.items() if not np.isnan(value)},
        )

    def labels(self, first: int = 0) -> Labels:
        """The labels of all rows, whose numbers begin at `first`."""
        given = [name for name in NUMBERS if not np.isnan(self.columns[name]).all()]
        scored = not bool(np.isnan(self.columns["score"]).all())
        return Labels(_Numbers(self, first), _Labels(self), given=given, scored=scored)

    def fingerprint(self) -> str:
        """A digest of all rows."""
        digest = hashlib.blake2b(digest_size=16)
        for name in _PER_ROW + _PER_IMAGE:
            digest.update(np.ascontiguousarray(self.columns[name]).tobytes())
        digest.update(json.dumps([self.prompts, self.sources]).encode())
        return digest.hexdigest()

    def dump(self, **facts: Any) -> dict[str, np.ndarray]:
        """As arrays to be written; `facts` come back from `load`."""
        told = json.dumps({"prompts": self.prompts, "sources": self.sources, "facts": facts})
        raw = np.frombuffer(told.encode("utf-8", "surrogatepass"), dtype=np.uint8)
        return {**self.columns, "told": raw}

    @classmethod
    def load(cls, arrays: Mapping[str, np.ndarray]) -> tuple[RowTable, dict[str, Any]]:
        """A table and its facts, from the arrays of `dump`."""
        told = json.loads(arrays["told"].tobytes().decode("utf-8", "surrogatepass"))
        columns = {name: arrays[name] for name in _PER_ROW + _PER_IMAGE}
        return cls(columns, told["prompts"], told["sources"]), told["facts"]


def _numbered(names: Iterable[str]) -> dict[str, int]:
    """Each name once, with its place."""
    return {name: at for at, name in enumerate(dict.fromkeys(names))}


class _Numbers(Sequence[int]):
    def __init__(self, table: RowTable, first: int) -> None:
        self._table = table
        self._first = first

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self._first + int(one) for one in self._table.columns["number"][index]]
        return self._first + self._table.number(index)


class _Labels(Sequence[Label]):
    def __init__(self, table: RowTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[Label]:
        return (self._table.label(row) for row in range(len(self._table)))

    @overload
    def __getitem__(self, index: int) -> Label: ...
    @overload
    def __getitem__(self, index: slice) -> list[Label]: ...
    def __getitem__(self, index: int | slice) -> Label | list[Label]:
        if isinstance(index, slice):
            return [self._table.label(row) for row in range(*index.indices(len(self)))]
        return self._table.label(index)
