"""`alignkit read-sheet`: what people's labels say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def read_sheet(
    folder: Annotated[Path, typer.Argument(help="Of `alignkit evaluate --sheet`.")],
    filled: Annotated[
        list[Path] | None, typer.Argument(help="Filled files; left out, all of the folder.")
    ] = None,
) -> None:
    """Print majorities and win rates of filled sheets."""
    from alignkit.evaluation import read_sheets

    found = read_sheets(folder, filled or None)
    typer.echo(found)
    if found.short:
        typer.echo(f"{found.short} items have fewer labels than the protocol's five.")
