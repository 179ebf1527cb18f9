"""Finished models in other forms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run_or_model: Annotated[str, typer.Argument(help="A run folder, or an adapter's folder.")],
    merged: Annotated[
        Path, typer.Option(help="A new folder for adapter and base as one model, without peft.")
    ],
    base: Annotated[
        str | None, typer.Option(help="The model under the adapter, where its files name none.")
    ] = None,
) -> None:
    """Write a finished model in another form."""
    from alignkit.export import export_merged

    typer.echo(export_merged(run_or_model, merged, base=base))
