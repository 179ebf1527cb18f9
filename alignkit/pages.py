"""HTML pages that are complete in themselves: pictures and style inside, no script, no link out."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from alignkit.facts import show


def render(template: str, **values: Any) -> str:
    """A page from `templates/`; everything that comes from data, models or options is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["show"] = show
    return environment.get_template(template).render(**values)


def inline(data: bytes, kind: str) -> str:
    """A picture as the source of an `img`."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
