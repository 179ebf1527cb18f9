"""`alignkit label`: scores for data that is there, preferences among a model's own answers."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from alignkit.errors import ConfigError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def group() -> None:
    """Label data by scorers, rewards and judges."""


_Scorers = Annotated[
    list[str],
    typer.Option(
        "--scorer",
        metavar="NAME[=WEIGHTS]",
        help="pickscore, hpsv2, clip, aesthetic, or module:function; repeatable.",
    ),
]
_Device = Annotated[str, typer.Option(help="Where scorers compute, such as cuda.")]
_Columns = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="OURS=THEIRS", help="Rename a column; repeatable."),
]


@app.command()
def images(
    data: Annotated[str, typer.Argument(help="Image rows: a file, folder or hub name.")],
    scorer: _Scorers,
    out: Annotated[Path, typer.Option(help="The folder of scores.")],
    device: _Device = "cpu",
    column: _Columns = None,
) -> None:
    """Score all images once; training reads the scores by data_options.labels."""
    from alignkit.parts import MODALITIES
    from alignkit.reward_names import name_of, reward_of

    labelling = import_module(f"{MODALITIES['image']}.labelling")

    scorers, made_by = {}, {}
    for given in scorer:
        reward = reward_of(given, "image", device=device)
        name = name_of(given, reward)
        if name in scorers:
            raise ConfigError(f"Each scorer has a name of its own; {name!r} is there twice.")
        scorers[name], made_by[name] = reward, given
    folder = labelling.score_images(data, scorers, out, columns=_renames(column), made_by=made_by)
    typer.echo(folder)


@app.command()
def samples(
    model: Annotated[str, typer.Argument(help="A model folder, pipeline folder or hub name.")],
    prompts: Annotated[str, typer.Argument(help="Rows with a prompt.")],
    scorer: _Scorers,
    out: Annotated[Path, typer.Option(help="The folder of preference rows.")],
    per_prompt: Annotated[int, typer.Option(help="Answers to each prompt.")] = 4,
    adapter: Annotated[str | None, typer.Option(help="An adapter folder to sample with.")] = None,
    seed: Annotated[int, typer.Option(help="The key of every random draw.")] = 0,
    generation: Annotated[
        list[str] | None,
        typer.Option("--generation", metavar="KEY=VALUE", help="Such as steps=30; repeatable."),
    ] = None,
    column: _Columns = None,
) -> None:
    """Generate and rank: sample answers, score them, keep the best and the worst as a pair.

    Of several scorers the scores are added up.
    """
    from alignkit.config import override
    from alignkit.labeller import sample_preferences
    from alignkit.options import GenerationOptions, LoRA
    from alignkit.schema import build

    folder = sample_preferences(
        model,
        prompts,
        out=out,
        reward=scorer[0] if len(scorer) == 1 else [(one, 1.0) for one in scorer],
        samples_per_prompt=per_prompt,
        adapter=None if adapter is None else LoRA(continue_from=adapter),
        columns=_renames(column),
        generation=build(GenerationOptions, override({}, generation or []), "generation"),
        seed=seed,
    )
    typer.echo(folder)


def _renames(columns: list[str] | None) -> dict[str, str]:
    pairs = [given.partition("=") for given in columns or ()]
    for given, (ours, _, theirs) in zip(columns or (), pairs, strict=True):
        if not ours or not theirs:
            raise ConfigError(f"--column is OURS=THEIRS, such as prompt=caption; got {given!r}.")
    return {ours: theirs for ours, _, theirs in pairs}
