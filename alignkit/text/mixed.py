"""The sets of a mixture read one after the other, each by its own columns."""

from __future__ import annotations

from collections import Counter
from typing import Any

from alignkit.errors import DataError
from alignkit.mixtures import Mixture
from alignkit.options import TextOptions
from alignkit.orders import Part
from alignkit.rows import read_rows
from alignkit.text.data import read_examples
from alignkit.text.examples import TextExamples


def read_mixture(
    mixture: Mixture, tokenizer: Any, options: TextOptions, kind: str, loss_on: str, room: int = 0
) -> TextExamples:
    """All usable rows of all sets; they are numbered on from set to set.

    Raises:
        DataError: for what `read_examples` refuses, or for a set without a usable row.
    """
    sets: list[TextExamples] = []
    parts: list[Part] = []
    skipped: Counter[str] = Counter()
    first = 0
    for name, data, weight in mixture.entries():
        rows = read_rows(data, columns=options.columns)
        found = read_examples(rows, tokenizer, options, kind, loss_on, first, room)
        if not len(found):
            raise DataError(
                f"Every set of a mixture has usable rows; {name} has none. Left out: "
                f"{dict(found.skipped)}."
            )
        sets.append(found)
        parts.append(Part(name, len(found), weight))
        skipped.update(found.skipped)
        first += len(rows)
    return TextExamples(
        [row for one in sets for row in one.rows],
        [label for one in sets for label in one.labels.labels],
        dict(skipped),
        any(one.chat for one in sets),
        parts,
    )
