"""`alignkit train FILE` where the file holds a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import typer


def train(given: Mapping[str, Any], where: str, *, dry_run: bool) -> None:
    """Run a recipe's stages, or print what was understood."""
    from alignkit.recipes import plan_of, run_recipe

    plan = plan_of(given, where)
    if dry_run:
        import yaml

        typer.echo(yaml.safe_dump(asdict(plan), sort_keys=False, allow_unicode=True), nl=False)
        return
    typer.echo(f"report: {run_recipe(plan)}")
