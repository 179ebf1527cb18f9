"""What reward models read beside plain comparisons: rated answers, critiques with a verdict, and
margins in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignkit.columns import BadRow
from alignkit.labels import Label, group_label, rated_label
from alignkit.options import MARGINS
from alignkit.text.formats import Rendered, is_messages, messages_of, render_answers

QUESTION = "{prompt}\n\nAnswer:\n{answer}\n\nCritique this answer, and end with a verdict."
"""What a model that writes critiques is asked."""
VERDICT = "\nVerdict: "
"""What stands between a critique and its verdict."""


def read_rated(
    tokenizer: Any, row: Mapping[str, Any]
) -> tuple[Rendered, Label | tuple[Label, ...]]:
    """An answer with its `score`, or K of them with `scores`, each on its own."""
    if "responses" not in row:
        answers = {"completion": row["completion"]}
        return render_answers(tokenizer, row["prompt"], answers, row), rated_label(row)
    responses = row["responses"]
    if not is_messages(responses):
        raise BadRow("bad responses", f"responses is a list of answers; got {responses!r}")
    places, label = group_label({**row, "ranking": None}, len(responses))
    answers = {f"responses[{place}]": responses[place] for place in places}
    each = tuple(Label((-1,), (score,), numbers=label.numbers) for score in label.score)
    return render_answers(tokenizer, row["prompt"], answers, row), each


def critique_row(row: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    """The demonstration that a critique is: asked with prompt and answer, written with verdict.

    Raises:
        BadRow: if the row lacks one.
    """
    for name in ("critique", "verdict"):
        if row.get(name) in (None, ""):
            raise BadRow(f"no {name}", f"a critique comes with {name}; got {row.get(name)!r}")
    written = f"{row['critique']}{VERDICT}{verdict_text(row['verdict'])}"
    kept = {name: row[name] for name in ("weight",) if name in row}
    asked = question(row["prompt"], row["completion"], chat)
    return {"prompt": asked, "completion": _answer(written, chat), **kept}


def verdict_text(verdict: Any) -> str:
    """A verdict as it is written: 4.0 of a csv file is 4."""
    whole = isinstance(verdict, float) and verdict.is_integer()
    return str(int(verdict)) if whole else str(verdict)


def question(prompt: Any, answer: Any, chat: bool) -> Any:
    """What is asked of a critic: one user's turn where there is a chat template, else a text."""
    text = QUESTION.format(prompt=_plain(prompt), answer=_plain(answer))
    return [{"role": "user", "content": text}] if chat else text + "\n\n"


def _answer(text: str, chat: bool) -> Any:
    return [{"role": "assistant", "content": text}] if chat else text


def _plain(part: Any) -> str:
    """A text, or a conversation as one."""
    if isinstance(part, str):
        return part
    messages = messages_of(part if is_messages(part) else [part], "prompt")
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{one['role']}: {one['content']}" for one in messages)


def with_margin(row: Mapping[str, Any], table: str | None) -> Mapping[str, Any]:
    """The row with a margin in words as Llama 2's number."""
    said = row.get("margin")
    if table is None or not isinstance(said, str):
        return row
    known = MARGINS[table]
    words = said.strip().lower()
    if words not in known:
        raise BadRow("bad margin", f"margin is one of {', '.join(known)}; got {said!r}")
    return {**row, "margin": known[words]}
