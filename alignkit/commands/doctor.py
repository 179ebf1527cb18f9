"""What a run is to be made of, looked at before it costs anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def group() -> None:
    """Look at what a run is to be made of, before it costs anything."""


@app.command()
def data(
    file: Annotated[str, typer.Argument(help="A file, folder or hub name of rows.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="A model folder or hub name whose tokenizer counts lengths.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="An HTML page to write.")] = None,
    kind: Annotated[
        str, typer.Option(help="pairs, groups, unpaired, supervised or prompts; auto: by columns.")
    ] = "auto",
    modality: Annotated[str, typer.Option(help="text or image; auto: by columns.")] = "auto",
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--options",
            metavar="KEY=VALUE",
            help="The run's data_options, such as max_length=512; repeatable.",
        ),
    ] = None,
) -> None:
    """Report what is in a data set, what is wrong with it, and what a run would leave out."""
    from alignkit.config import override
    from alignkit.doctor import examine
    from alignkit.doctor.show import page, terminal

    report = examine(
        file,
        modality=modality,
        kind=kind,
        tokenizer=tokenizer,
        data_options=override({}, options or []),
    )
    typer.echo(terminal(report))
    if out is not None:
        from alignkit.atomic import atomic_write

        atomic_write(out, page(report))
        typer.echo(f"\npage: {out}")
