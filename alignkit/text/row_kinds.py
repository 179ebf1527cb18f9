"""The columns of each kind of rows; what is tokenised of a row, or taken as ids, and its label."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from alignkit.columns import BadRow, Column
from alignkit.labels import Label, group_label, pair_label, single_label
from alignkit.text.content import Ids
from alignkit.text.formats import Rendered, is_messages, render_answers
from alignkit.text.prompt_rows import Question, read_question
from alignkit.text.rated_rows import read_rated
from alignkit.text.tokens import GROUP_IDS, PAIR_IDS, SUPERVISED_IDS, ids_of, ids_of_all

LAYOUTS: Mapping[str, tuple[tuple[Column, ...], ...]] = {
    "pairs": (("chosen", "rejected"), PAIR_IDS),
    "groups": (
        ("prompt", "responses", ("ranking", "scores")),
        (*GROUP_IDS, ("ranking", "scores")),
    ),
    "unpaired": (
        ("prompt", "completion", "label"),
        ("chosen", "rejected"),
        PAIR_IDS,
        (*SUPERVISED_IDS, "label"),
    ),
    "supervised": (("messages",), ("prompt", "completion"), SUPERVISED_IDS, ("text",)),
    "rated": (("prompt", "completion", "score"), ("prompt", "responses", "scores")),
    "critiques": (("prompt", "completion", "critique", "verdict"),),
    "prompts": (("prompt",), PAIR_IDS[:1], ("messages",), ("chosen", "rejected")),
}
"""Kind of rows -> the ways to write them; a pair's prompt may be what its answers share."""

Tokens = tuple[Ids, tuple[Ids, ...]]
"""A prompt and its answers as ids."""


def _pair(tokenizer: Any, row: Mapping[str, Any]) -> tuple[Rendered | Tokens, Label]:
    label = pair_label(row)
    if PAIR_IDS[0] in row:
        prompt, *answers = (ids_of(row, column) for column in PAIR_IDS)
        return (prompt, tuple(answers)), label
    answers_of = {name: row[name] for name in ("chosen", "rejected")}
    return render_answers(tokenizer, row.get("prompt"), answers_of, row), label


def _group(tokenizer: Any, row: Mapping[str, Any]) -> tuple[Rendered | Tokens, Label]:
    name = GROUP_IDS[1] if GROUP_IDS[1] in row else "responses"
    responses = row[name]
    if not is_messages(responses):
        raise BadRow(f"bad {name}", f"{name} is a list of answers; got {responses!r}")
    places, label = group_label(row, len(responses))
    if name == GROUP_IDS[1]:
        return (ids_of(row, GROUP_IDS[0]), ids_of_all(row, name, places)), label
    answers = {f"responses[{place}]": responses[place] for place in places}
    return render_answers(tokenizer, row["prompt"], answers, row), label


def _single(
    tokenizer: Any, row: Mapping[str, Any]
) -> tuple[Rendered | Tokens, Label | tuple[Label, ...]]:
    """One labelled answer, or a pair's two: the chosen one liked, the other not."""
    if "label" not in row:
        item, _ = _pair(tokenizer, row)
        return item, tuple(single_label({**row, "label": liked}) for liked in (True, False))
    if SUPERVISED_IDS[1] in row:
        prompt, completion = (ids_of(row, column) for column in SUPERVISED_IDS)
        return (prompt, (completion,)), single_label(row)
    answers = {"completion": row["completion"]}
    rendered = render_answers(tokenizer, row["prompt"], answers, row)
    return rendered, single_label(row)


READERS: Mapping[
    str,
    Callable[
        [Any, Mapping[str, Any]], tuple[Rendered | Tokens | Question, Label | tuple[Label, ...]]
    ],
] = {
    "pairs": _pair,
    "groups": _group,
    "unpaired": _single,
    "rated": read_rated,
    "prompts": read_question,
}
"""Kind of rows of answers -> what reads a row of it."""
