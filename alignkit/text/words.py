"""Where plain text can be cut between two words, so that what rows share is encoded once.

A byte-level tokenizer first splits text into words by an expression, and then makes tokens of each
word for itself. All expressions in use put a single blank to the letters that follow it, and end a
run of letters before a blank. So between an ASCII letter and a blank with an ASCII letter behind it

    ids(head + rest) = ids(head) + ids(rest)

where neither side sees the other: no normalisation crosses the place, and no added token does.
Tokenizers of other make (sentencepiece's, WordPiece) are not cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

WORD_END = re.compile(r"(?s:.*)[A-Za-z](?= [A-Za-z])")
"""Matches the head of a text up to the last place where it can be cut."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
)
EXPRESSIONS = frozenset(
    {
        # GPT-2, and what followed it
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        # Llama 3, and cl100k
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}",
        # Qwen 2 and 3
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}",
        # o200k
        rf"{_CASED}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
)
"""How byte-level tokenizers find words, as their files say it."""


Frame = tuple[list[int], list[int]]
"""The ids that a tokenizer puts before and after a text."""


def frame(tokenizer: Any) -> Frame | None:
    """What goes around the ids of a text that may be cut between words; None if none may."""
    core = tokenizer.backend_tokenizer
    if not _splits_words(core, tokenizer.added_tokens_decoder.values()):
        return None
    bare, whole = (core.encode("a", add_special_tokens=special).ids for special in (False, True))
    places = [
        place
        for place in range(len(whole) - len(bare) + 1)
        if whole[place : place + len(bare)] == bare
    ]
    if len(places) != 1 or not bare:
        return None
    return whole[: places[0]], whole[places[0] + len(bare) :]


def _splits_words(core: Any, added: Iterable[Any]) -> bool:
    """Whether a tokenizer's core makes tokens of each word for itself."""
    from tokenizers.models import BPE

    kinds = [_told(part) for part in (core.normalizer, core.pre_tokenizer)]
    one_by_one = isinstance(core.model, BPE) and not core.model.dropout
    return (
        one_by_one
        and kinds[0].get("type") in (None, "NFC")
        and _finds_words(kinds[1])
        and all(map(_keeps_out, added))
    )


def _told(part: Any) -> dict[str, Any]:
    """A part of a tokenizer as its file describes it."""
    found: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return found


def _finds_words(pre: dict[str, Any]) -> bool:
    steps = pre.get("pretokenizers", [pre])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return False
    if len(steps) == 1:
        return bool(last.get("use_regex", True))
    first = steps[0]
    if len(steps) == 2 and first.get("type") == "Digits":
        return bool(last.get("use_regex", True))
    return (
        len(steps) == 2
        and not last.get("use_regex", True)
        and first.get("type") == "Split"
        and first.get("behavior") == "Isolated"
        and not first.get("invert")
        and first.get("pattern", {}).get("Regex") in EXPRESSIONS
    )


def _keeps_out(token: Any) -> bool:
    """Whether an added token is never found across a blank between two letters."""
    text: str = token.content
    blank = any(letter.isspace() for letter in text)
    swallows = (token.lstrip and text[:1].isalpha()) or (token.rstrip and text[-1:].isalpha())
    return not (blank or swallows)
