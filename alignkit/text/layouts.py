"""Published data sets in their own columns, each brought to ours by one small function.

A layout is recognised by the names of its columns on the first row. Dialogues become messages where
the tokenizer has a chat template, and plain text where it has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.columns import TIE, BadRow, Tie, number

Row = Mapping[str, Any]
Convert = Callable[[Row, bool], dict[str, Any]]
"""`(row, chat)` -> a row in our columns; `chat`: whether there is a template for messages."""


@dataclass(frozen=True)
class Layout:
    """One published layout.

    Attributes:
        name: of the data that have it.
        columns: all of which a row has.
        convert: kind of rows -> how a row becomes one of that kind.
        without: columns of which a row has none.
        looks: what the values look like, where names alone do not tell.
    """

    name: str
    columns: tuple[str, ...]
    convert: Mapping[str, Convert]
    without: tuple[str, ...] = ()
    looks: Callable[[Row], bool] = lambda row: True

    def to(self, kind: str) -> Convert:
        """How a row becomes one of this kind; of prompts, any that has one."""
        return self.convert[next(iter(self.convert)) if kind == "prompts" else kind]

    def fits(self, row: Row) -> bool:
        """Whether a row has this layout."""
        named = all(name in row for name in self.columns)
        return named and not any(name in row for name in self.without) and self.looks(row)


def recognise(row: Row, kind: str | None = None) -> Layout | None:
    """The layout of a data set with this first row, None for our own columns.

    Args:
        row: the first one.
        kind: of rows that are asked for; None takes any.
    """
    anything = kind in (None, "prompts")
    fitting = (one for one in LAYOUTS if anything or kind in one.convert)
    return next((one for one in fitting if one.fits(row)), None)


# --- HH-RLHF: two transcripts that begin alike ---

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(row: Row) -> bool:
    """Whether both answers are written as "Human: ... Assistant: ..."."""
    texts = [row["chosen"], row["rejected"]]
    return all(isinstance(text, str) and _TURN.match(text) for text in texts)


def hh_rlhf(row: Row, chat: bool) -> dict[str, Any]:
    """The transcripts' shared turns are the prompt; it ends where the assistant last speaks."""
    chosen, rejected = (_turns(row[name], name) for name in ("chosen", "rejected"))
    limit = min(len(chosen), len(rejected)) - 1
    shared = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    while shared > 0 and not chosen[shared][0] == rejected[shared][0] == "Assistant":
        shared -= 1
    if shared == 0:
        raise BadRow("the transcripts share no question that the assistant answers")
    sides = {"chosen": chosen[shared:], "rejected": rejected[shared:]}
    if chat:
        return {"prompt": _messages(chosen[:shared])} | {k: _messages(v) for k, v in sides.items()}
    prompt = "".join(f"\n\n{who}:{text}" for who, text in chosen[:shared]) + "\n\nAssistant:"
    return {"prompt": prompt} | {
        name: turns[0][1] + "".join(f"\n\n{who}:{text}" for who, text in turns[1:])
        for name, turns in sides.items()
    }


def _turns(text: Any, name: str) -> list[tuple[str, str]]:
    if not isinstance(text, str) or not _TURN.match(text):
        raise BadRow(f'{name} is no transcript that begins with "\\n\\nHuman:"')
    _, *parts = _TURN.split(text)
    return list(zip(parts[::2], parts[1::2], strict=True))


def _messages(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": _ROLES[who], "content": text.strip()} for who, text in turns]


# --- TL;DR: summaries of a post or an article ---


def tldr(row: Row, chat: bool) -> dict[str, Any]:
    """The prompt of Stiennon et al. (2009.01325, table 6), and the summary that was chosen."""
    info, summaries = row["info"], row["summaries"]
    choice = number(row, "choice")
    if choice not in (0.0, 1.0):
        raise BadRow("bad choice", f"choice is 0 or 1; got {row['choice']!r}")
    if not isinstance(summaries, Sequence) or len(summaries) != 2:
        raise BadRow("summaries must be two")
    if info.get("article"):
        prompt = f"ARTICLE: {info['article']}\n\nTL;DR:"
    else:
        head = f"SUBREDDIT: r/{info.get('subreddit')}\n\nTITLE: {info.get('title')}"
        prompt = f"{head}\n\nPOST: {info.get('post')}\n\nTL;DR:"
    texts = [" " + str(one["text"]).strip() for one in summaries]
    return {"prompt": prompt, "chosen": texts[int(choice)], "rejected": texts[1 - int(choice)]}


# --- UltraFeedback: completions with ratings of aspects, or already as pairs ---


def ultrafeedback(row: Row, chat: bool) -> dict[str, Any]:
    """A ranking by the mean of each completion's ratings; one that nobody rated has no score."""
    completions = row["completions"]
    if not isinstance(completions, Sequence) or isinstance(completions, str):
        raise BadRow("completions is no list")
    return {
        "prompt": _asked(row["instruction"], chat),
        "responses": [one.get("response") for one in completions],
        "scores": [_mean_rating(one.get("annotations") or {}) for one in completions],
    }


def ultrafeedback_pair(row: Row, chat: bool) -> dict[str, Any]:
    """The best-rated completion against the worst-rated; the first of equals."""
    ranked = ultrafeedback(row, chat)
    rated = [i for i, score in enumerate(ranked["scores"]) if score is not None]
    if len(rated) < 2:
        raise BadRow("fewer than two rated completions")
    best = max(rated, key=lambda i: ranked["scores"][i])
    worst = min(rated, key=lambda i: ranked["scores"][i])
    if ranked["scores"][best] == ranked["scores"][worst]:
        raise Tie(TIE)
    pair: dict[str, Any] = {"prompt": ranked["prompt"]}
    for name, place in (("chosen", best), ("rejected", worst)):
        pair |= {name: ranked["responses"][place], f"score_{name}": ranked["scores"][place]}
    return pair


def _mean_rating(annotations: Mapping[str, Any]) -> float | None:
    found = [_rating(aspect) for aspect in annotations.values()]
    values = [value for value in found if value is not None]
    return sum(values) / len(values) if values else None


def _rating(aspect: Any) -> float | None:
    """An aspect's rating; "N/A" where it does not apply."""
    try:
        return float(aspect["Rating"])
    except (KeyError, TypeError, ValueError):
        return None


def scored_pair(row: Row, chat: bool) -> dict[str, Any]:
    """The pair as it stands; it may repeat the chosen side as `messages`."""
    return {name: row[name] for name in row if name not in ("messages", "prompt_id")}


def rated_pair(row: Row, chat: bool) -> dict[str, Any]:
    """The pair, with its ratings under our names."""
    scores = {f"score_{side}": row[f"{side}-rating"] for side in ("chosen", "rejected")}
    return {name: row[name] for name in ("prompt", "chosen", "rejected")} | scores


# --- HelpSteer: single responses with attributes; two with a strength ---

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
LIKED_FROM = 3
"""On HelpSteer's scale of 0 to 4, where 2 is "partially helpful"."""


def helpsteer(row: Row, chat: bool) -> dict[str, Any]:
    """A single answer, liked from helpfulness 3 of 4 on."""
    helpful = number(row, "helpfulness")
    if helpful is None or not 0 <= helpful <= 4:
        raise BadRow(
            "bad helpfulness", f"helpfulness is between 0 and 4; got {row['helpfulness']!r}"
        )
    asked = _asked(row["prompt"], chat)
    return {"prompt": asked, "completion": row["response"], "label": helpful >= LIKED_FROM}


def by_strength(prompt: str, sides: tuple[str, str], strength: str) -> Convert:
    """Two responses, and how much better the second is: below 0 the first is, 0 is a tie."""

    def convert(row: Row, chat: bool) -> dict[str, Any]:
        value = number(row, strength)
        if value is None or not -3 <= value <= 3:
            raise BadRow(
                f"bad {strength}", f"{strength} is between -3 and 3; got {row[strength]!r}"
            )
        if value == 0:
            raise Tie(TIE)
        loser, winner = sides if value > 0 else sides[::-1]
        asked = _asked(row[prompt], chat)
        return {"prompt": asked, "chosen": row[winner], "rejected": row[loser]}

    return convert


def _asked(prompt: Any, chat: bool) -> Any:
    return [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "HH-RLHF",
        ("chosen", "rejected"),
        {"pairs": hh_rlhf, "unpaired": hh_rlhf},
        without=("prompt",),
        looks=is_transcript,
    ),
    Layout(
        "TL;DR comparisons",
        ("info", "summaries", "choice"),
        {"pairs": tldr, "unpaired": tldr},
    ),
    Layout(
        "UltraFeedback",
        ("instruction", "completions"),
        {
            "groups": ultrafeedback,
            "pairs": ultrafeedback_pair,
            "unpaired": ultrafeedback_pair,
        },
    ),
    Layout(
        "UltraFeedback, binarized",
        ("prompt", "chosen", "rejected", "messages", "score_chosen", "score_rejected"),
        {"pairs": scored_pair, "unpaired": scored_pair},
    ),
    Layout(
        "UltraFeedback, binarized with ratings",
        ("prompt", "chosen", "rejected", "chosen-rating", "rejected-rating"),
        {"pairs": rated_pair, "unpaired": rated_pair},
        without=("score_chosen",),
    ),
    Layout("HelpSteer", ("prompt", "response", *ATTRIBUTES), {"unpaired": helpsteer}),
    Layout(
        "HelpSteer2 preferences",
        ("prompt", "response_1", "response_2", "preference_strength"),
        {
            kind: by_strength("prompt", ("response_1", "response_2"), "preference_strength")
            for kind in ("pairs", "unpaired")
        },
    ),
    Layout(
        "HelpSteer3 preferences",
        ("context", "response1", "response2", "overall_preference"),
        {
            kind: by_strength("context", ("response1", "response2"), "overall_preference")
            for kind in ("pairs", "unpaired")
        },
    ),
)
"""Recognised in this order; a new one is a function and an entry."""
