"""What is computed once and kept between runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def group() -> None:
    """Compute ahead what runs would compute, and keep it for all of them."""


@app.command()
def reference(
    config_or_model: Annotated[
        str, typer.Argument(help="A YAML file, or the folder or hub name of a language model.")
    ],
    rest: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA] [KEY=VALUE]...",
            help="Beside a model, its data; then options that win over the file's.",
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where the numbers are kept; the user's cache without it.")
    ] = None,
) -> None:
    """Keep the log-likelihoods of a reference, such as: alignkit cache reference MODEL DATA."""
    from dataclasses import replace

    from alignkit.config import RunConfig, from_file, from_mapping, override
    from alignkit.errors import ConfigError
    from alignkit.reference_options import CachedReference

    given = list(rest or ())
    config: RunConfig
    if config_or_model.endswith((".yaml", ".yml")):
        config = from_file(config_or_model, given)
    elif not given or "=" in given[0]:
        raise ConfigError(
            "Beside a model, the data must be given; write alignkit cache reference "
            f"{config_or_model} DATA."
        )
    else:
        run = {"policy": config_or_model, "method": "dpo", "data": given[0]}
        config = from_mapping(override(run, given[1:]), where="command line")
    if folder is not None:
        kept = config.reference
        kept = kept if isinstance(kept, CachedReference) else CachedReference(kept)
        config = replace(config, reference=replace(kept, folder=folder))
    from alignkit.ahead import compute_ahead

    done = compute_ahead(config)
    typer.echo(f"computed: {done.computed} answers\nkept: {done.known} numbers in {done.folder}")


@app.command()
def images(
    data_or_config: Annotated[
        str, typer.Argument(help="Image rows: a file, folder or hub name; or a run's YAML file.")
    ],
    rest: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Options of the runs to come."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A pipeline's folder or hub name; a YAML file names it.")
    ] = None,
    folder: Annotated[
        str | None, typer.Option(help="The cache; the user's own without it.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="pairs, groups, unpaired or supervised; a YAML file's method says it."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of it first; mend what is damaged.")
    ] = False,
) -> None:
    """Keep latents and prompt embeddings, such as: alignkit cache images DATA --model PIPELINE."""
    from alignkit.caching import cache_run
    from alignkit.config import from_file, from_mapping, override
    from alignkit.errors import ConfigError

    given = [*(rest or ()), *([] if folder is None else [f"data_options.cache={folder}"])]
    if data_or_config.endswith((".yaml", ".yml")):
        config = from_file(data_or_config, given)
    elif model is None:
        raise ConfigError(
            "Images are encoded by a pipeline; write alignkit cache images "
            f"{data_or_config} --model PIPELINE."
        )
    else:
        run = {"policy": model, "method": "dpo", "data": data_or_config, "adapter": {"rank": 16}}
        config = from_mapping(override(run, given), where="command line")
    done = cache_run(config, kind=kind, verify=verify)
    for name in ("rows", "images", "prompts", "encoded", "damaged", "folder"):
        typer.echo(f"{name}: {getattr(done, name)}")
    for reason, count in done.skipped.items():
        typer.echo(f"left out: {count} rows, {reason}")
