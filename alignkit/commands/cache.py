"""What is computed once and kept between runs."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def group() -> None:
    """Compute ahead what runs would compute, and keep it for all of them."""
