"""The sets of a mixture as one: each is read, and encoded, by its own columns."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import Any, TypeVar, overload

from alignkit.batches import Batch
from alignkit.errors import DataError
from alignkit.labels import Labels
from alignkit.mixtures import Mixture
from alignkit.options import ImageOptions
from alignkit.orders import Part
from alignkit_diffusion.cache.keys import short_hash
from alignkit_diffusion.content import ImageContent
from alignkit_diffusion.data import ImageExamples, prepare_examples

T = TypeVar("T")


class MixedImages:
    """Prepared rows of several sets, one set after the other: `Examples`.

    Attributes:
        parts: the sets in the order of their rows, from which a source draws by their weights.
        skipped: reason -> rows left out by the options.
    """

    def __init__(self, sets: Sequence[ImageExamples], parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self._sets = list(sets)
        self._ends = list(accumulate(len(one) for one in sets))
        self.skipped: dict[str, int] = dict(sum((Counter(s.skipped) for s in sets), Counter()))
        self.labels = Labels(
            Chained([one.labels.rows for one in sets]),
            Chained([one.labels.labels for one in sets]),
            given={name for one in sets for name in one.labels.given},
            scored=any(one.labels.scored for one in sets),
        )

    def __len__(self) -> int:
        return self._ends[-1]

    def collate(self, indices: Sequence[int], epochs: Sequence[int]) -> Batch:
        places = [
            (*_place(self._ends, index), epoch)
            for index, epoch in zip(indices, epochs, strict=True)
        ]
        found = []
        for number, some in groupby(places, key=lambda place: place[0]):
            own = list(some)
            rows, when = [row for _, row, _ in own], [epoch for _, _, epoch in own]
            found.append(self._sets[number].content(rows, when))
        return self.labels.batch(ImageContent.joined(found), indices)

    def fingerprint(self) -> str:
        return short_hash(*(one.fingerprint() for one in self._sets)).hex()

    def mismatched(self, indices: Sequence[int]) -> list[int]:
        places = [_place(self._ends, index) for index in indices]
        prompts = [self._sets[number].prompt(row) for number, row in places]
        return self.labels.mismatched(indices, prompts)


class Chained(Sequence[T]):
    """Sequences one after the other, none of them copied."""

    def __init__(self, parts: Sequence[Sequence[T]]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, place = _place(self._ends, index)
        return self._parts[number][place]


def _place(ends: Sequence[int], index: int) -> tuple[int, int]:
    """The part, and the place in it, of the `index`-th entry of parts that end at `ends`."""
    number = bisect_right(ends, index)
    return number, index - (ends[number - 1] if number else 0)


def prepared(data: Any, options: ImageOptions, **given: Any) -> ImageExamples | MixedImages:
    """Prepared rows of one set or of a mixture, whose rows are numbered on from set to set.

    Args:
        data, options, given: of `data.prepare_examples`.

    Raises:
        DataError: for what that refuses; or a set has no usable row.
    """
    if not isinstance(data, Mixture):
        return prepare_examples(data, options, **given)
    sets: list[ImageExamples] = []
    parts: list[Part] = []
    first = 0
    for name, one, weight in data.entries():
        found = prepare_examples(one, options, **given, first=first, may_be_empty=True)
        first = found.end
        if len(found):
            sets.append(found)
            parts.append(Part(name, len(found), weight))
        elif options.part != "held_out":
            raise DataError(
                f"Every set of a mixture has usable rows; {name} has none. Left out: "
                f"{found.skipped}."
            )
    if not sets:
        raise DataError(
            "Of no set of the mixture is a row held out. Raise data_options.held_out_share, or "
            "name other data as eval_data."
        )
    return MixedImages(sets, parts)
