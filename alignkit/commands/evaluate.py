"""`alignkit evaluate`: a model against what it was trained from, or against another one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    run_or_model: Annotated[str, typer.Argument(help="A run folder, model folder or hub name.")],
    against: Annotated[
        str,
        typer.Option(help="The opponent: a run, a model, 'auto' (what it began with) or 'none'."),
    ] = "auto",
    data: Annotated[str | None, typer.Option(help="Held-out pairs: a file, folder or hub.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompts that both answer: txt, jsonl, json, csv, tsv.")
    ] = None,
    prompt_column: Annotated[str | None, typer.Option(help="The column of the prompts.")] = None,
    num_prompts: Annotated[int | None, typer.Option(help="The first so many prompts only.")] = None,
    reward: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="MODULE:FUNCTION, or a scorer such as pickscore."),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="Says P(a beats b).")
    ] = None,
    edit: Annotated[
        str | None, typer.Option(metavar="STRENGTHS", help="Edit pictures, such as 0.3,0.6,0.9.")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="A new folder for a blind sheet that people fill.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder for the page, numbers, answers and pictures.")
    ] = None,
    generation: Annotated[
        list[str] | None,
        typer.Option("--generation", metavar="KEY=VALUE", help="Such as steps=20; repeatable."),
    ] = None,
    data_option: Annotated[
        list[str] | None,
        typer.Option("--data-option", metavar="KEY=VALUE", help="Such as eval_draws=8."),
    ] = None,
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
