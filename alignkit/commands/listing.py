"""What there is: methods, losses, citations, the schema of configuration files."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def list_methods() -> None:
    """List the methods with paper and what they need."""
    from alignkit.methods import methods

    columns = ("name", "class", "needs", "paper")
    _print_table(columns, [[row[column] for column in columns] for row in methods()])


def list_losses(
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="As the tables of docs/formulas.md.")
    ] = False,
) -> None:
    """List the losses: equation, paper, needs, minimiser, defaults, options."""
    from alignkit.losses import listing

    if as_markdown:
        typer.echo(listing.markdown())
        return
    for title, losses in listing.TABLES.items():
        typer.echo(f"{title}\n")
        for loss in losses.values():
            typer.echo(f"{listing.entry(loss)}\n")


def cite(
    file_or_method: Annotated[str, typer.Argument(help="A YAML file, or a method such as dpo.")],
) -> None:
    """Print BibTeX of the papers that a run or a method rests on."""
    from alignkit.cite import citations, cited_modalities
    from alignkit.methods import METHODS

    if file_or_method in METHODS:
        entries = [
            e
            for wing in cited_modalities(file_or_method)
            for e in citations(file_or_method, None, wing)
        ]
    else:
        from alignkit import api
        from alignkit.config import from_file
        from alignkit.criteria import cited_options, named_losses

        config = from_file(file_or_method)
        method, modality = config.method, api.modality_of(config.policy)
        adapter = None if config.adapter is None else config.adapter.kind
        options = cited_options(method, config.reference)
        entries = citations(method.name, named_losses(method), modality, adapter, options)
    typer.echo("\n\n".join(dict.fromkeys(entries)))


def schema() -> None:
    """Print the JSON schema of configuration files, for editors."""
    from alignkit.run_schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


def _print_table(columns: tuple[str, ...], rows: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_lines=True)
    for column in columns:
        short = column in ("name", "options")
        table.add_column(column, overflow="fold", no_wrap=short)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)
