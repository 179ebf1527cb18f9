"""One image of a row: where it came from, without its pixels; decoded when they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image

from alignkit.columns import BadRow
from alignkit.errors import DataError
from alignkit.rows import Row, Rows
from alignkit_diffusion.images import digest, open_image


@dataclass(frozen=True)
class Picture:
    """One image of a row, without its pixels.

    Attributes:
        row, column: where it came from, to decode it again and to name it in errors.
        digest: hash of its decoded pixels.
        height, width: as it is, upright, in pixels.
        place: where in a column that holds a list; None in one that holds the image itself.
        stamp: path, bytes and time of the file that it is in, if it is in one.
    """

    row: int
    column: str
    digest: str
    height: int
    width: int
    place: int | None = None
    stamp: tuple[str, int, int] | None = field(default=None, compare=False)


def open_picture(
    rows: Rows, row: Row, index: int, column: str, place: int | None = None
) -> tuple[Picture, Image]:
    """An image of row `index`, decoded.

    Raises:
        BadRow: it is not there or cannot be decoded.
    """
    if column not in row:
        raise BadRow("no image", f"there is no column {column!r} in this row")
    try:
        source = _held(rows, _source(row, column, place))
        image = open_image(source, rows.folder)
    except BadRow as bad:
        raise BadRow(bad.reason, f"column {_name(column, place)!r}: {bad}") from bad
    facts = (digest(image), image.height, image.width, place, _stamp(source, rows.folder))
    return Picture(index, column, *facts), image


def _stamp(source: Any, folder: Path | None) -> tuple[str, int, int] | None:
    if isinstance(source, Mapping):
        source = source.get("path") if source.get("bytes") is None else None
    if not isinstance(source, str | Path):
        return None
    path = (folder or Path()) / Path(source).expanduser()
    found = path.stat()
    return str(path.absolute()), found.st_size, found.st_mtime_ns


def reopen(rows: Rows, picture: Picture) -> Image:
    """Decode an image again.

    Raises:
        DataError: it has changed or gone since it was read.
    """
    try:
        source = _source(rows[picture.row], picture.column, picture.place)
        image = open_image(_held(rows, source), rows.folder)
    except BadRow as bad:
        raise DataError(f"{where(rows, picture)}: {bad}; it was readable before.") from bad
    if digest(image) != picture.digest:
        raise DataError(
            f"{where(rows, picture)}: the image changed while it was trained on. Start the run "
            "anew."
        )
    return image


def where(rows: Rows, picture: Picture) -> str:
    """How errors name an image: row, column, and its path if it has one."""
    try:
        source = _source(rows[picture.row], picture.column, picture.place)
    except DataError:  # a row of a stream that has gone by
        source = None
    if isinstance(source, Mapping):
        source = source.get("path")
    path = f" ({source})" if isinstance(source, str) else ""
    return f"{rows.where(picture.row)}, column {_name(picture.column, picture.place)!r}{path}"


def _source(row: Row, column: str, place: int | None) -> Any:
    return row.get(column) if place is None else row[column][place]


def _held(rows: Rows, source: Any) -> Any:
    """The source, unless it is a path in an archive, which may lead anywhere on this machine."""
    if rows.sealed and isinstance(source, str | Path | Mapping):
        raise BadRow("path in an archive", "an archive holds its images itself; got a path")
    return source


def _name(column: str, place: int | None) -> str:
    return column if place is None else f"{column}[{place}]"
