"""`alignkit evaluate`: a model against what it was trained from, or against another one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_Reward = Annotated[
    str | None, typer.Option(metavar="NAME", help="MODULE:FUNCTION, or a scorer such as pickscore.")
]
_Judge = Annotated[str | None, typer.Option(metavar="MODULE:FUNCTION", help="Says P(a beats b).")]
_Prompts = Annotated[
    str | None, typer.Option(help="Prompts that both answer: txt, jsonl, json, csv, tsv.")
]
_Against = Annotated[
    str, typer.Option(help="The opponent: a run, a model, 'auto' (what it began with) or 'none'.")
]
_Edit = Annotated[
    str | None, typer.Option(metavar="STRENGTHS", help="Edit pictures, such as 0.3,0.6,0.9.")
]
_Sheet = Annotated[
    Path | None, typer.Option(help="A new folder for a blind sheet that people fill.")
]
_Out = Annotated[
    Path | None, typer.Option(help="The folder for the page, numbers, answers and pictures.")
]
_Generation = Annotated[
    list[str] | None,
    typer.Option("--generation", metavar="KEY=VALUE", help="Such as steps=20; repeatable."),
]
_DataOption = Annotated[
    list[str] | None,
    typer.Option("--data-option", metavar="KEY=VALUE", help="Such as eval_draws=8; repeatable."),
]


def evaluate(
    run_or_model: Annotated[str, typer.Argument(help="A run folder, model folder or hub name.")],
    against: _Against = "auto",
    data: Annotated[str | None, typer.Option(help="Held-out pairs: a file, folder or hub.")] = None,
    prompts: _Prompts = None,
    prompt_column: Annotated[str | None, typer.Option(help="The column of the prompts.")] = None,
    num_prompts: Annotated[int | None, typer.Option(help="The first so many prompts only.")] = None,
    reward: _Reward = None,
    judge: _Judge = None,
    edit: _Edit = None,
    sheet: _Sheet = None,
    out: _Out = None,
    generation: _Generation = None,
    data_option: _DataOption = None,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    seed: Annotated[int, typer.Option(help="The key of every random draw.")] = 0,
) -> None:
    """Evaluate a run or model: held-out accuracy, win rates, drift, pictures, sheets for people."""
    from alignkit.config import override
    from alignkit.evaluation import evaluate as run
    from alignkit.evaluation.options import data_options_of, strengths_of
    from alignkit.options import GenerationOptions
    from alignkit.reward_names import function_of
    from alignkit.schema import build

    options = None
    if generation:
        options = build(GenerationOptions, override({}, generation), "generation")
    found = run(
        run_or_model,
        against=against,
        data=data,
        prompts=prompts,
        prompt_column=prompt_column,
        num_prompts=num_prompts,
        reward=reward,
        judge=None if judge is None else function_of(judge, "judge"),
        edit=strengths_of(edit),
        sheet=sheet,
        out=out,
        generation=options,
        data_options=data_options_of(run_or_model, data_option or ()),
        precision=precision,
        seed=seed,
    )
    typer.echo(found)
    if sheet is not None:
        typer.echo(f"Sheet: {sheet / 'index.html'}")
