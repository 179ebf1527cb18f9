"""The command line. Heavy imports stay inside the commands, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from alignkit import __version__
from alignkit.commands import cache, doctor, evaluate, export, label, listing, read_sheet, recipe
from alignkit.errors import AlignkitError


class _Commands(TyperGroup):
    """Errors that a user can cause end in one message and exit code 2, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AlignkitError as error:
            if ctx.params.get("debug"):
                raise
            typer.secho(f"{type(error).__name__}: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Align language models and SDXL pipelines with preferences.",
)

_Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Options that win over the file's."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"alignkit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of errors; before the command.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    file: Annotated[Path, typer.Argument(help="A YAML file, as in configs/.")],
    overrides: _Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check, print the whole configuration, load no weights."),
    ] = False,
) -> None:
    """Run a YAML file, such as: alignkit train FILE seed=1. One with `recipe:` is several runs."""
    from alignkit.config import check, from_mapping, to_mapping
    from alignkit.yaml_file import override, read_yaml

    given = override(read_yaml(file), overrides or ())
    if "recipe" in given:
        recipe.train(given, str(file), dry_run=dry_run)
        return
    config = from_mapping(given, where=str(file))
    from alignkit import api

    if dry_run:
        import yaml

        modality = api.modality_of(config.policy)
        check(config, modality)
        resolved = {**to_mapping(config), "resolved": {"modality": modality}}
        typer.echo(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), nl=False)
        return
    result = api.align(**{f.name: getattr(config, f.name) for f in fields(config)})
    for name, value in result.metrics.items():
        typer.echo(f"{name}: {value:.4g}")
    if result.run_dir is not None:
        typer.echo(f"run folder: {result.run_dir}\nreport: {result.report}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder for the demo's runs.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A shortened version.")] = False,
) -> None:
    """Align the tiny models that come with alignkit."""
    from alignkit.demo.run import main as run_demo

    run_demo(out=out, quick=quick)


@app.command()
def sample(
    run_or_model: Annotated[str, typer.Argument(help="A run folder, model folder or hub name.")],
    prompts: Annotated[list[str], typer.Argument(help="One answer is sampled for each.")],
    seed: Annotated[int, typer.Option(help="The key of every random draw.")] = 0,
    generation: Annotated[
        list[str] | None,
        typer.Option(
            "--generation",
            metavar="KEY=VALUE",
            help="Such as max_new_tokens=64; repeatable. Without any, the run's own options hold.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder for answers; images go to samples/ without it.")
    ] = None,
) -> None:
    """Sample answers or images from a finished run or a model."""
    from alignkit import api
    from alignkit.config import override
    from alignkit.options import GenerationOptions
    from alignkit.schema import build

    options = None
    if generation:
        options = build(GenerationOptions, override({}, generation), "generation")
    for i, answer in enumerate(api.sample(run_or_model, prompts, options, seed)):
        text = isinstance(answer, str)
        if text:
            typer.echo(answer)
        if not text or out is not None:
            path = (out or Path("samples")) / f"{i:03d}.{'txt' if text else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if text:
                path.write_text(answer, encoding="utf-8")
            else:
                answer.save(path)
                typer.echo(path)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Rebuild the report.html of a run folder."""
    from alignkit.report import rebuild

    typer.echo(rebuild(run))


app.add_typer(cache.app, name="cache")
app.add_typer(label.app, name="label")
app.add_typer(doctor.app, name="doctor")
app.command()(evaluate.evaluate)
app.command("read-sheet")(read_sheet.read_sheet)
app.command()(export.export)
app.command("methods")(listing.list_methods)
app.command("losses")(listing.list_losses)
app.command()(listing.cite)
app.command()(listing.schema)


def main() -> None:
    """The entry point of the command `alignkit`."""
    app(prog_name="alignkit")
